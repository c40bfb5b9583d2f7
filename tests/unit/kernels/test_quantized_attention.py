"""Decode attention over int8, int4 and int2 in every instruction set of this machine, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.kernels.fast_forms import Form, NativeForm
from tests.unit.kernels.lanes import Lanes, close, make_lanes, make_pool

from kvatlas.core.layout import BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import encode_blocks, read_keys, read_values
from kvatlas.kernels.decode_attention import native, reference
from kvatlas.kernels.native import Missing, library
from kvatlas.kernels.pool import Part

QUANTIZED = [Format.INT8, Format.INT4, Format.INT2]
PACKED = [Format.INT4, Format.INT2]
ISAS = ["avx512", "avx2", "baseline"]


def native_form(isa: str) -> NativeForm:
    """Return the native form in one instruction set; skip the test where it does not run."""
    found = library()
    if isinstance(found, Missing):
        pytest.skip(f"no native kernels: {found.reason}")
    if isa not in found.available:
        pytest.skip(f"this processor has no {isa}")
    kernel = replace(found, isa=isa).function("kva_decode_attention")
    return NativeForm(native, "decode_attention", kernel, threads=1)


@pytest.fixture(params=ISAS)
def attend(request: pytest.FixtureRequest) -> Form:
    """The native form in one instruction set."""
    return native_form(request.param)


@pytest.fixture
def forms() -> list[Form]:
    """The native form in each instruction set that runs here."""
    found = library()
    available = [] if isinstance(found, Missing) else found.available
    return [native_form(isa) for isa in ISAS if isa in available] or [native_form(ISAS[-1])]


def options(q: torch.Tensor, **changed: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("softcap", "sinks", "window", "query_position", "slots", "shared"))
    return plain | {"scale": q.shape[-1] ** -0.5, "need_mass": True} | changed


def agree(forms: list[Form], q: torch.Tensor, parts: list[Part], **changed: Any) -> None:
    """Nearly all numbers are equal; a few may differ by a rounding of 8 bits that float32 sees on the other side."""
    want_out, want_mass = reference.decode_attention(q, parts, **options(q, **changed))
    packed = any(part.pool.layout.format.is_packed for part in parts)
    for form in forms:
        out, mass = form(q, parts, **options(q, **changed))
        for got, want in ((out, want_out), *zip(mass, want_mass, strict=True)):
            assert got.isfinite().all(), form
            close(got, want, atol=4e-3 if packed else 5e-5, rtol=2e-3 if packed else 2e-4, form=form)
            if got.numel():
                assert (got - want).abs().median() < 3e-5, form
        assert all(((got == 0) == (want == 0)).all() for got, want in zip(mass, want_mass, strict=True)), form


def batched(lanes: Lanes, rows: int) -> Part:
    C = lanes.table.shape[-1]
    return replace(lanes.part, table=lanes.table.view(rows, -1, C), length=lanes.length.view(rows, -1))


@pytest.mark.parametrize("dims", [(60, 20), (80, 80), (128, 128), (20, 33), (256, 256), (1, 1), (33, 100)])
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("format", QUANTIZED)
def test_dims_and_groups_of_all_kinds(forms: list[Form], format: Format, group: int, dims: tuple[int, int]) -> None:
    torch.manual_seed(sum(dims) + group)
    lanes = make_lanes([0, 1, 33, 70], key_dim=dims[0], value_dim=dims[1], format=format, block_size=32)
    agree(forms, torch.randn(2, 2 * group, dims[0]), [batched(lanes, 2)])


@pytest.mark.parametrize("block_size", [1, 5, 16, 40, 64, 1024])
def test_int8_blocks_of_all_sizes(forms: list[Form], block_size: int) -> None:
    torch.manual_seed(0)
    lanes = make_lanes([block_size, 2 * block_size + 1, 7], key_dim=40, format=Format.INT8, block_size=block_size)
    agree(forms, torch.randn(1, 12, 40), [batched(lanes, 1)])


@pytest.mark.parametrize("format", QUANTIZED)
def test_largest_codes_do_not_overflow(forms: list[Form], format: Format) -> None:
    lanes = make_lanes([96], key_dim=1024, value_dim=64, format=format, block_size=32)
    pool = lanes.part.pool
    blocks = lanes.table.flatten().long()
    for codes in (pool.key_codes, pool.value_codes):
        codes[blocks] = 127 if format is Format.INT8 else 255
    for params in (pool.key_params, pool.value_params):
        params[blocks] = 0.25
    # Equal scores, the largest weights that there are.
    agree(forms, torch.ones(1, 4, 1024), [batched(lanes, 1)], scale=1e-3)
    agree(forms, -torch.ones(1, 4, 1024), [batched(lanes, 1)], scale=1e-3)


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, -torch.inf])
def test_parameters_of_hidden_tokens_do_not_matter(attend: Form, format: Format, hidden: float) -> None:
    torch.manual_seed(1)
    lanes = make_lanes([64, 40], key_dim=64, format=format, block_size=32, end=80)
    empty = [0, 3, 31, *range(33, 40)]
    for slot in empty:
        block = int(lanes.table[1, slot // 32])
        lanes.pos_pool[block, slot % 32] = -1
        lanes.part.pool.value_params[block, :, :, slot % 32] = hidden
    part = replace(batched(lanes, 1), hide_empty=True)
    q = torch.randn(1, 6, 64)
    agree([attend], q, [part])
    agree([attend], q, [part], window=30, query_position=torch.tensor([79]))
    _, (mass,) = attend(q, [part], **options(q))
    assert (mass[0, 1, empty] == 0).all()
    lanes.pos_pool[lanes.table.long()] = -1
    out, (mass,) = attend(q, [part], **options(q))
    assert (out == 0).all() and (mass == 0).all()


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("window", [None, 50])
def test_old_tokens_packed_and_new_ones_not(forms: list[Form], format: Format, window: int | None) -> None:
    torch.manual_seed(2)
    old = make_lanes([64, 0, 32, 96], key_dim=80, format=format, block_size=32, dense_start=0, hide_empty=True)
    new = make_lanes([13, 24, 0, 1], key_dim=80, format=Format.FP16, block_size=32, dense_start=96)
    changed = {"sinks": torch.randn(8), "softcap": 5.0, "window": window}
    position = None if window is None else torch.tensor([110, 100])
    agree(forms, torch.randn(2, 8, 80), [batched(old, 2), batched(new, 2)], query_position=position, **changed)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_chosen_slots(forms: list[Form], format: Format, count: int) -> None:
    torch.manual_seed(3)
    lanes = make_lanes([70, 64], key_dim=64, format=format, block_size=32)
    slots = torch.stack([torch.randperm(64)[:count] for _ in range(2)]).int()[None]
    part = replace(batched(lanes, 1), length=torch.full((1, 2), count))
    agree(forms, torch.randn(1, 6, 64), [part], slots=slots)


@pytest.mark.parametrize("format", QUANTIZED)
def test_queries_and_blocks_of_zeros(attend: Form, format: Format) -> None:
    layout = BlockLayout(key_dim=64, value_dim=64, format=format)
    pool, ids = make_pool(layout, 2)
    pool.positions[ids] = 0
    k, v = torch.zeros(2, 32, 64), torch.zeros(2, 32, 64)
    k[1], v[1] = torch.randn(32, 64), 2.0
    encode_blocks(pool, torch.tensor(ids), k, v)
    part = Part(pool=pool, table=torch.tensor(ids, dtype=torch.int32).view(1, 1, 2), length=torch.full((1, 1), 64))
    q = torch.zeros(1, 3, 64)
    out, (mass,) = attend(q, [part], **options(q))
    close(mass, torch.full((1, 1, 64), 3 / 64))
    close(out, torch.ones(1, 3, 64), rtol=1e-3)
    agree([attend], torch.randn(1, 3, 64) * 1e-20, [part])
    agree([attend], torch.randn(1, 3, 64), [part])


@pytest.mark.parametrize(("format", "most"), [(Format.INT8, 1e-4), (Format.INT4, 0.05), (Format.INT2, 0.05)])
def test_integers_add_little_to_the_error_of_the_format(attend: Form, format: Format, most: float) -> None:
    """On Gaussian data the error of int4 itself is near 0.13, that of int2 near 0.6."""
    torch.manual_seed(4)
    pool, ids = make_pool(BlockLayout(key_dim=128, value_dim=128, format=format), 64)
    pool.positions[ids] = 0
    encode_blocks(pool, torch.tensor(ids), torch.randn(64, 32, 128), torch.randn(64, 32, 128))
    table = torch.tensor(ids, dtype=torch.int32).view(1, 2, 32)
    part = Part(pool=pool, table=table, length=torch.full((1, 2), 1024))
    q = torch.randn(1, 8, 128)
    out, _ = attend(q, [part], **options(q))
    k, v = (read(pool, table, torch.float32) for read in (read_keys, read_values))
    exact = torch.nn.functional.scaled_dot_product_attention(q.view(1, 2, 4, 128), k, v).view(1, 8, 128)
    assert (out - exact).norm() / exact.norm() < most
