"""The small-batch linear against its reference, in every format, and in every instruction set that runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvatlas.core.errors import UnsupportedError
from kvatlas.core.vocabulary import Format
from kvatlas.kernels import small_linear as op
from kvatlas.kernels.native import Library, library
from kvatlas.kernels.small_linear import (
    FORMATS,
    MAX_ROWS,
    decode,
    encode,
    exact_format,
    native,
    reference,
    small_linear,
)

FOUND = library()
ISAS = FOUND.available if isinstance(FOUND, Library) else ()
NEEDS_NATIVE = pytest.mark.skipif(not ISAS, reason="no native kernels here")
SIZES = [(1, 1), (3, 5), (4, 16), (7, 17), (8, 64), (12, 67), (13, 130), (33, 257), (70, 512)]


@pytest.fixture(params=ISAS or [pytest.param("none", marks=NEEDS_NATIVE)])
def isa(request, monkeypatch) -> str:
    monkeypatch.setattr(native, "library", lambda: replace(FOUND, isa=request.param))
    return request.param


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, weights: op.LinearWeights, bias: Tensor | None) -> Tensor:
    return reference.small_linear(x, decode(weights, torch.float64), bias)


def check(xs: list[Tensor], weights: op.LinearWeights, *biases: Tensor | None) -> None:
    """Compare rows of several numbers with the reference, under each bias."""
    exact, rows = decode(weights, torch.float64), torch.cat(xs)
    allowed = 1e-6 * (rows.abs().double() @ exact.abs().T) + 1e-6
    for bias in biases or (None,):
        linear = native.bind(weights, bias)
        got = torch.cat([linear(x) for x in xs])
        assert bool(((got - reference.small_linear(rows, exact, bias)).abs() <= allowed).all())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_outputs, num_inputs", SIZES)
def test_odd_sizes(isa, format, num_outputs, num_inputs):
    weights = encode(numbers(num_outputs, num_inputs), format)
    bias = numbers(num_outputs, seed=2)
    xs = [numbers(rows, num_inputs, seed=rows) for rows in (1, 2, 3, 4, 5, 6, 7, 11, 16, 31, 32)]
    check(xs, weights, None, bias)


@pytest.mark.parametrize("format", FORMATS)
def test_all_rows_up_to_the_most_with_several_blocks_and_threads(isa, format, monkeypatch):
    weights, bias = encode(numbers(1030, 520), format), numbers(1030, seed=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check([numbers(rows, 520, seed=rows) for rows in range(1, MAX_ROWS + 1)], weights, bias)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_gives_the_same_bits_alone_and_in_company(isa, format, monkeypatch):
    weights, bias = encode(numbers(1003, 333), format), numbers(1003, seed=1)
    x = numbers(MAX_ROWS, 333, seed=3)
    linear = native.bind(weights, bias)
    alone = torch.cat([linear(row[None]) for row in x])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    linear = native.bind(weights, bias)
    for rows in (2, 3, 5, 8, 17, 32):
        assert torch.equal(linear(x[:rows].clone()), alone[:rows])


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_beside_the_arguments_is_read_or_written(isa, format):
    """What lies around weights, rows and outputs is NaN; a read beyond a row would show."""
    rows, num_outputs, num_inputs = 5, 6, 37
    weights = encode(numbers(num_outputs, num_inputs), format)
    if format.is_float:
        around = torch.full((num_outputs * num_inputs + 128,), torch.nan, dtype=weights.codes.dtype)
        inside = around[64:-64].view(num_outputs, num_inputs)
        weights = replace(weights, codes=inside.copy_(weights.codes))
    x = torch.full((rows * num_inputs + 128,), torch.nan)[64:-64].view(rows, num_inputs)
    check([x.copy_(numbers(rows, num_inputs))], weights)


@pytest.mark.parametrize("format", [Format.FP32, Format.BF16, Format.FP16])
def test_not_a_number_and_infinity_stay_where_they_belong(isa, format):
    weight, x = numbers(9, 40), numbers(4, 40, seed=1)
    weight[2, 7], weight[5, 39], x[1, 3] = torch.inf, torch.nan, torch.nan
    weights = encode(weight, format)
    out, wanted = native.bind(weights, None)(x), expected(x, weights, None)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    torch.testing.assert_close(out[finite], wanted[finite])


@NEEDS_NATIVE
@pytest.mark.parametrize("shape", [(0, 8), (1, 0, 8), (2, 3, 8), (8,)])
def test_leading_dimensions_stay(shape):
    weights = encode(numbers(5, 8), Format.FP32)
    x = numbers(*shape)
    out = native.bind(weights, None)(x)
    assert out.shape == (*shape[:-1], 5)
    torch.testing.assert_close(out, expected(x, weights, None))


@NEEDS_NATIVE
@pytest.mark.parametrize("format", FORMATS)
def test_empty_weights(format):
    bias = numbers(3)
    assert native.bind(encode(numbers(0, 8), format), None)(numbers(2, 8)).shape == (2, 0)
    torch.testing.assert_close(native.bind(encode(numbers(3, 0), format), bias)(numbers(2, 0)), bias.expand(2, 3))


@pytest.mark.parametrize("form", ["reference", "torch", pytest.param("native", marks=NEEDS_NATIVE)])
@pytest.mark.parametrize("format", FORMATS)
def test_every_form_means_the_same(form, format, monkeypatch):
    monkeypatch.setenv("KVATLAS_KERNELS", form)
    weights, bias, x = encode(numbers(10, 20), format), numbers(10, seed=1), numbers(2, 3, 20, seed=2)
    torch.testing.assert_close(small_linear(x.mT.contiguous().mT, weights, bias), expected(x, weights, bias))


def test_what_is_not_covered_is_refused():
    weights = encode(numbers(4, 8), Format.FP32)
    with pytest.raises(UnsupportedError, match=r"up to 32 rows of float32, got 33 of torch\.float32"):
        small_linear(numbers(33, 8), weights)
    with pytest.raises(UnsupportedError, match=r"got 2 of torch\.float64"):
        small_linear(numbers(2, 8).double(), weights)


def test_the_exact_format_is_the_smallest_that_changes_nothing():
    weight = numbers(64, 48)
    in_bf16, in_fp16 = weight.bfloat16().float(), weight.half().float()
    assert exact_format(in_bf16) is Format.BF16
    assert exact_format(in_fp16) is Format.FP16
    assert exact_format(weight) is Format.FP32
    in_bf16[-1, -1] = 1 + 2**-20
    assert exact_format(in_bf16) is Format.FP32
    for format, values in ((Format.BF16, weight.bfloat16().float()), (Format.FP16, in_fp16), (Format.FP32, weight)):
        assert torch.equal(decode(encode(values, format)), values)


def test_a_format_rounds_to_the_nearest():
    weight = numbers(50, 70)
    weight[3] = 0
    weights = encode(weight, Format.INT8)
    assert weights.scale is not None
    assert bool(((decode(weights) - weight).abs() <= weights.scale[:, None] * 0.5001).all())
    assert torch.equal(weights.codes.abs().amax(dim=1), torch.full((50,), 127, dtype=torch.int8) * (weight[:, 0] != 0))
    assert torch.equal(encode(weight, Format.FP16).codes, weight.half())


def test_large_weights_are_encoded_part_by_part(monkeypatch):
    weight = numbers(50, 70)
    whole = {format: encode(weight, format) for format in FORMATS}
    monkeypatch.setattr(op, "_CHUNK_ELEMENTS", 300)
    for format in FORMATS:
        part = encode(weight, format)
        assert torch.equal(part.codes, whole[format].codes)
        assert format is not Format.INT8 or torch.equal(part.scale, whole[format].scale)


def test_weights_that_do_not_fit_are_refused():
    weight = numbers(4, 8)
    weight[1, 1] = 1e6
    with pytest.raises(UnsupportedError, match="a weight of 1e\\+06 does not fit into fp16; use bf16 or fp32"):
        encode(weight, Format.FP16)
    weight[1, 1] = torch.inf
    with pytest.raises(UnsupportedError, match="int8 cannot hold weights that are NaN or infinite"):
        encode(weight, Format.INT8)


@pytest.mark.parametrize("format, nbytes", [("fp32", 4 * 40), ("bf16", 2 * 40), ("fp16", 2 * 40), ("int8", 40 + 4 * 5)])
def test_bytes(format, nbytes):
    assert encode(numbers(5, 8), Format(format)).nbytes == nbytes
