"""The native decoder layer against its reference, in every instruction set that runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvatlas.core.vocabulary import Format
from kvatlas.kernels.layer import LayerWeights, Linear, Norm, native, reference
from kvatlas.kernels.native import Library, library
from kvatlas.kernels.small_linear import FORMATS, MAX_ROWS, encode

FOUND = library()
ISAS = FOUND.available if isinstance(FOUND, Library) else ()
NEEDS_NATIVE = pytest.mark.skipif(not ISAS, reason="no native kernels here")


@pytest.fixture(params=ISAS or [pytest.param("none", marks=NEEDS_NATIVE)])
def isa(request, monkeypatch) -> str:
    monkeypatch.setattr(native, "library", lambda: replace(FOUND, isa=request.param))
    return request.param


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(
    hidden: int, inner: int, num_query_heads: int, num_kv_heads: int, dim: int,
    *, format: Format = Format.FP32, bias: bool = False, head_norms: bool = False,
) -> LayerWeights:  # fmt: skip
    """A layer whose activations neither vanish nor explode."""

    def linear(outputs: int, inputs: int, seed: int) -> Linear:
        weights = encode(numbers(outputs, inputs, seed=seed) / inputs**0.5, format)
        return Linear(weights=weights, bias=numbers(outputs, seed=seed + 50) if bias else None)

    def norm(width: int, seed: int) -> Norm:
        return Norm(weight=1 + 0.3 * numbers(width, seed=seed), eps=1e-5)

    return LayerWeights(
        q=linear(num_query_heads * dim, hidden, 1),
        k=linear(num_kv_heads * dim, hidden, 2),
        v=linear(num_kv_heads * dim, hidden, 3),
        o=linear(hidden, num_query_heads * dim, 4),
        gate=linear(inner, hidden, 5),
        up=linear(inner, hidden, 6),
        down=linear(hidden, inner, 7),
        input_norm=norm(hidden, 8),
        output_norm=norm(hidden, 9),
        query_norm=norm(dim, 10) if head_norms else None,
        key_norm=norm(dim, 11) if head_norms else None,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
    )


def inputs(layer: LayerWeights, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, cos, sin, and what the queries read, each [rows, ...]."""
    hidden, dim = layer.q.weights.codes.shape[1], layer.head_dim
    x, cos, sin = (numbers(rows, width, seed=rows + width) for width in (hidden, dim, dim + 1))
    return x, cos, sin[:, :dim].contiguous(), numbers(rows, layer.num_query_heads, dim, seed=3)


def check(layer: LayerWeights, rows: int) -> None:
    x, cos, sin, attended = inputs(layer, rows)
    bound = native.NativeLayer(layer)
    for got, expected in zip(bound.queries(x[None], cos, sin), reference.queries(layer, x, cos, sin), strict=True):
        torch.testing.assert_close(got[0], expected, rtol=2e-5, atol=2e-5)
    got = bound.output(x[None], attended[None])[0]
    torch.testing.assert_close(got, reference.output(layer, x, attended), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 2), (17, 23, 3, 1, 6), (64, 96, 4, 2, 16), (130, 70, 2, 2, 34), (48, 200, 16, 1, 32)]
)
def test_odd_sizes(isa, format, sizes):
    for number, rows in enumerate((1, 2, 5, 17, MAX_ROWS)):
        check(made(*sizes, format=format, bias=number % 2 == 0, head_norms=number % 3 == 0), rows)


def test_no_row_at_all(isa):
    check(made(16, 24, 2, 1, 8), 0)


def test_a_row_gives_the_same_bits_alone_in_company_and_with_more_threads(isa, monkeypatch):
    layer = made(520, 1040, 6, 2, 66, format=Format.BF16, bias=True, head_norms=True)
    bound = native.NativeLayer(layer)
    x, cos, sin, attended = inputs(layer, MAX_ROWS)

    def run(rows: slice) -> tuple[Tensor, ...]:
        found = bound.queries(x[None, rows], cos[rows], sin[rows])
        return (*found, bound.output(x[None, rows], attended[None, rows]))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = [torch.cat(each, dim=1) for each in zip(*(run(slice(i, i + 1)) for i in range(MAX_ROWS)), strict=True)]
    for threads, rows in ((1, 32), (2, 7), (3, 32), (5, 16)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for got, expected in zip(run(slice(0, rows)), alone, strict=True):
            assert torch.equal(got, expected[:, :rows])


@pytest.mark.parametrize("rows", [1, 33, 500])
@pytest.mark.parametrize("head_norms", [True, False])
def test_norms_and_rotation_of_many_rows(isa, rows, head_norms, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    layer = made(130, 70, 3, 1, 34, head_norms=head_norms)
    bound = native.NativeLayer(layer)
    x, cos, sin, _ = inputs(layer, rows)
    torch.testing.assert_close(bound.input_norm(x[None])[0], reference.norm(layer.input_norm, x))
    torch.testing.assert_close(bound.output_norm(x[None])[0], reference.norm(layer.output_norm, x))
    q, k, _ = reference.queries(layer, x, cos, sin)
    normed = reference.norm(layer.input_norm, x)
    turned = [normed @ each.weights.codes.T for each in (layer.q, layer.k)]
    bound.turn_heads(turned[0][None], turned[1][None], cos, sin)
    torch.testing.assert_close(turned[0].view_as(q), q, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(turned[1].view_as(k), k, rtol=2e-5, atol=2e-5)


def test_extreme_gates_neither_overflow_nor_hide_what_is_not_a_number(isa):
    layer = made(8, 4, 1, 1, 8)
    x = torch.zeros(1, 1, 8)
    for gate in (-1e30, -200.0, -88.0, 88.0, 200.0):
        forced = replace(
            layer, gate=Linear(weights=encode(torch.zeros(4, 8), Format.FP32), bias=torch.full((4,), gate))
        )
        attended = numbers(1, 1, 1, 8)
        got = native.NativeLayer(forced).output(x, attended)[0]
        torch.testing.assert_close(got, reference.output(forced, x[0], attended[0]), rtol=2e-5, atol=2e-5)
    x[0, 0, 3] = torch.nan
    assert bool(native.NativeLayer(layer).output(x, torch.zeros(1, 1, 1, 8)).isnan().all())


def test_layers_that_do_not_fit_together_are_refused(isa):
    layer = made(16, 24, 2, 1, 8)
    wrong = replace(layer, up=Linear(weights=encode(numbers(23, 16), Format.FP32)))
    with pytest.raises(RuntimeError, match="shapes"):
        native.NativeLayer(wrong).output(torch.zeros(1, 1, 16), torch.zeros(1, 1, 2, 8))
    with pytest.raises(RuntimeError, match="shapes"):
        native.NativeLayer(layer).output(torch.zeros(1, 33, 16), torch.zeros(1, 33, 2, 8))
