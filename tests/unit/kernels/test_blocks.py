from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.core.layout import GRANULE, BlockLayout
from kvatlas.core.streams import SideLayout, Stream
from kvatlas.core.vocabulary import Format
from kvatlas.kernels import blocks
from kvatlas.kernels.abi import FLOAT_TYPES
from kvatlas.kernels.blocks import native, reference, torch_path
from kvatlas.kernels.blocks.packing import pack_keys, pack_values, unpack_keys, unpack_values
from kvatlas.kernels.native import Library, library
from kvatlas.kernels.pool import BlockPool, Entries, SidePool

FLOATS = [Format.FP32, Format.BF16, Format.FP16]
PACKED = [Format.INT4, Format.INT2]
DIMS = [(60, 60), (80, 20), (128, 128), (20, 80), (32, 1), (1, 33)]
POISON = 0xFF
"""As int8 -1, as a code the highest, as any float NaN: no result may depend on it."""


def make_pool(
    format: Format,
    dims: tuple[int, int] = (60, 20),
    *,
    block_size: int = 32,
    count: int = 4,
    positions: bool = True,
) -> tuple[BlockPool, torch.Tensor]:
    """A poisoned arena and the ids of ``count`` blocks in it, in random order, with poison between them."""
    layout = BlockLayout(key_dim=dims[0], value_dim=dims[1], format=format, block_size=block_size, positions=positions)
    step = layout.block_bytes // GRANULE + 1
    memory = torch.full((count * step * GRANULE + 2 * GRANULE,), POISON, dtype=torch.uint8)
    return BlockPool(memory, layout), torch.randperm(count) * step + 1


def random_blocks(pool: BlockPool, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with channels of very different sizes, as models have, one constant channel and one zero token."""
    layout = pool.layout
    k = torch.randn(n, layout.block_size, layout.key_dim) * torch.logspace(-3, 3, layout.key_dim) + 1
    v = torch.randn(n, layout.block_size, layout.value_dim) * torch.logspace(-9, 5, layout.block_size)[:, None]
    k[..., 0] = 3.0
    v[:, 0] = 0.0
    return k.to(dtype), v.to(dtype)


class InInstructionSet:
    """The native forms in one instruction set, on two threads."""

    def __init__(self, found: Library, isa: str) -> None:
        self.library = replace(found, isa=isa)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "library", lambda: self.library)
                patch.setattr(native, "num_threads", lambda: 2)
                return getattr(native, name)(*arguments)

        return call


def forms(dtype: torch.dtype = torch.float32) -> list[Any]:
    """What is compared with the reference for numbers of a type."""
    found = library()
    every = [torch_path, blocks]
    if isinstance(found, Library) and dtype in FLOAT_TYPES:
        every += [InInstructionSet(found, isa) for isa in found.available]
    return every


@pytest.mark.parametrize("rows, lanes", [(1, 1), (1, 3), (4, 3), (5, 1)])
@pytest.mark.parametrize("format", [Format.FP32, Format.INT8])
def test_tokens_of_a_step_go_where_its_lanes_lie_among_all(rows, lanes, format):
    """Decode steps hand over a layer's columns of one table of slots for all layers."""
    torch.manual_seed(rows + lanes)
    pool, ids = make_pool(format, count=rows * 7)
    table, at = ids.view(rows, 7), torch.randint(32, (rows, 7))
    k, v = torch.randn(rows, lanes, 60), torch.randn(rows, lanes, 20)
    places = [
        (table[:, 2 : 2 + lanes], at[:, 2 : 2 + lanes]),
        (table[:, 2 : 2 + lanes], at[:, 2 : 2 + lanes].contiguous()),
        (table[:, 2 : 2 + lanes].int(), at[:, 2 : 2 + lanes]),
    ]
    torch_path.write_slots(pool, places[0][0], places[0][1], k, v)
    expected = pool.memory.clone()
    for form in forms():
        for block, offset in places:
            pool.memory.fill_(POISON)
            form.write_slots(pool, block.long() if form is torch_path else block, offset, k, v)
            assert torch.equal(pool.memory, expected)


def formats_and_dims() -> Iterator[Any]:
    """Yield every format with all dims; the reference packs bit by bit, so half of that is for the wide run."""
    for format, dims in product(Format, DIMS):
        wide = format in PACKED and dims in ((60, 60), (20, 80), (32, 1))
        yield pytest.param(format, dims, marks=pytest.mark.slow if wide else [])


@pytest.mark.parametrize(("format", "dims"), formats_and_dims())
def test_encoded_blocks_are_the_reference_byte_for_byte(format: Format, dims: tuple[int, int]) -> None:
    torch.manual_seed(sum(dims))
    pool, ids = make_pool(format, dims)
    k, v = random_blocks(pool, 2)
    clean = pool.memory.clone()
    reference.encode_blocks(pool, ids[:2], k, v)
    want = pool.memory.clone()
    for form in forms():
        pool.memory.copy_(clean)
        form.encode_blocks(pool, ids[:2], k, v)
        assert torch.equal(pool.memory, want)
    for read in ("read_keys", "read_values"):
        table = ids[:2].int()[torch.tensor([[1, 0], [1, 1]])]
        wanted = getattr(reference, read)(pool, table, torch.float32)
        for form in forms():
            assert torch.equal(getattr(form, read)(pool, table, torch.float32), wanted)


@pytest.mark.parametrize("block_size", [1, 5, 16, 32])
@pytest.mark.parametrize("format", [*FLOATS, Format.INT8])
def test_blocks_of_any_size(format: Format, block_size: int) -> None:
    torch.manual_seed(block_size)
    pool, ids = make_pool(format, (20, 60), block_size=block_size)
    k, v = random_blocks(pool, 4, torch.bfloat16)
    clean = pool.memory.clone()
    reference.encode_blocks(pool, ids, k, v)
    want = pool.memory.clone()
    for form in forms():
        pool.memory.copy_(clean)
        form.encode_blocks(pool, ids, k, v)
        assert torch.equal(pool.memory, want)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for form in forms(dtype):
            got, wanted = (each.read_values(pool, ids.view(2, 2), dtype) for each in (form, reference))
            assert got.dtype == dtype
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", [Format.INT8, *PACKED])
def test_keys_and_values_of_any_float_type(format: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    pool, ids = make_pool(format)
    k, v = random_blocks(pool, 2, torch.float32)
    k, v = k.to(dtype), v.clamp(-6e4, 6e4).to(dtype)
    clean = pool.memory.clone()
    reference.encode_blocks(pool, ids[:2], k, v)
    want = pool.memory.clone()
    for form in forms(dtype):
        pool.memory.copy_(clean)
        form.encode_blocks(pool, ids[:2], k, v)
        assert torch.equal(pool.memory, want)


@pytest.mark.parametrize("format", [Format.INT8, *PACKED])
def test_numbers_that_half_precision_cannot_scale(format: Format) -> None:
    pool, ids = make_pool(format, (32, 32))
    k = torch.linspace(-1e30, 1e30, 32 * 32).view(1, 32, 32)
    v = torch.linspace(-1e-9, 1e-9, 32 * 32).view(1, 32, 32)
    clean = pool.memory.clone()
    reference.encode_blocks(pool, ids[:1], k, v)
    want = pool.memory.clone()
    for form in forms():
        pool.memory.copy_(clean)
        form.encode_blocks(pool, ids[:1], k, v)
        assert torch.equal(pool.memory, want)
        assert form.read_keys(pool, ids[:1], torch.float32).isfinite().all()
        assert form.read_values(pool, ids[:1], torch.float32).isfinite().all()


@pytest.mark.parametrize("format", [Format.INT8, *PACKED])
@pytest.mark.parametrize("form", [reference, torch_path, blocks])
def test_what_comes_back_is_within_half_a_step(format: Format, form: Any) -> None:
    torch.manual_seed(2)
    pool, ids = make_pool(format, (40, 72))
    k, v = torch.randn(2, 32, 40), torch.randn(2, 32, 72)
    form.encode_blocks(pool, ids[:2], k, v)
    for x, read, group_dim in ((k, form.read_keys, 1), (v, form.read_values, 2)):
        got = read(pool, ids[:2, None], torch.float32)
        if format is Format.INT8:
            step = x.abs().amax(dim=2, keepdim=True) / 127
        else:
            dim = group_dim if read is form.read_keys else 2
            step = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**format.bits - 1)
        # Scales and minima are rounded to float16, so the last level may miss the greatest number a little.
        assert ((got - x).abs() <= 0.5 * step * 1.01 + 8e-3).all()


@pytest.mark.parametrize("format", [*FLOATS, Format.INT8])
@pytest.mark.parametrize("with_values", [True, False])
def test_slots_are_written_alone(format: Format, with_values: bool) -> None:
    torch.manual_seed(3)
    pool, ids = make_pool(format, (20, 33), block_size=8)
    block, offset = ids[torch.tensor([[0, 2, 2], [1, 1, 3]])], torch.tensor([[0, 7, 1], [3, 4, 0]])
    k, v = torch.randn(2, 3, 20), torch.randn(2, 3, 33)
    clean = pool.memory.clone()
    arguments = (pool, block, offset, k, v if with_values else None)
    reference.write_slots(*arguments)
    want = pool.memory.clone()
    for form in forms():
        pool.memory.copy_(clean)
        form.write_slots(*arguments)
        assert torch.equal(pool.memory, want)
    exact = 0.02 if format is Format.INT8 else 0.005
    torch.testing.assert_close(
        blocks.read_keys(pool, block[..., None], torch.float32).view(2, 3, 8, 20)[0, 1, 7],
        k[0, 1],
        atol=exact,
        rtol=exact,
    )


@pytest.mark.parametrize("format", [*FLOATS, Format.INT8])
def test_slots_are_copied_as_if_at_once(format: Format) -> None:
    torch.manual_seed(4)
    pool, ids = make_pool(format, (20, 33), block_size=8)
    pool.memory.random_(0, 256)
    source = ids[torch.tensor([0, 0, 1, 2])], torch.tensor([1, 2, 5, 7])
    target = ids[torch.tensor([0, 1, 0, 3])], torch.tensor([2, 5, 1, 0])
    clean = pool.memory.clone()
    reference.copy_slots(pool, source, target)
    want = pool.memory.clone()
    assert not torch.equal(want, clean)
    for form in forms():
        pool.memory.copy_(clean)
        form.copy_slots(pool, source, target)
        assert torch.equal(pool.memory, want)


def test_blocks_without_values() -> None:
    pool, ids = make_pool(Format.FP16, (19, 0), positions=False)
    k = torch.randn(2, 19)
    for form in (reference, *forms()):
        form.write_slots(pool, ids[:2], torch.tensor([3, 0]), k, None)
        got = form.read_keys(pool, ids[:2, None], torch.float32)
        assert torch.equal(got[0, 3], k[0].half().float())
        assert form.read_values(pool, ids[:2, None], torch.float32).shape == (2, 32, 0)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("format", list(Format))
def test_few_blocks(format: Format, count: int) -> None:
    pool, ids = make_pool(format, (20, 20))
    ids = ids[:count]
    blocks.encode_blocks(pool, ids, torch.randn(count, 32, 20), torch.randn(count, 32, 20))
    assert blocks.read_keys(pool, ids, torch.float32).shape == (count * 32, 20)
    assert blocks.read_values(pool, ids.view(1, 1, count), torch.float16).shape == (1, 1, count * 32, 20)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 4]), width=st.integers(1, 70), n=st.integers(1, 3), seed=st.integers(0, 99))
def test_packing_loses_nothing(bits: int, width: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, 32, width), dtype=torch.uint8)
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        assert torch.equal(unpack(pack(codes, bits), bits, width), codes)


def bounded(keys: torch.Tensor) -> tuple[SidePool, torch.Tensor]:
    """Blocks beside those of keys [n, s, Dk] that hold their bounds, behind another stream, and one more of poison."""
    bounds = Stream(name="bounds", width=2 * keys.shape[2], every=None)
    layout = SideLayout((Stream(name="other", width=3, dtype="uint8"), bounds), keys.shape[1])
    step = layout.block_bytes // GRANULE + 1
    pool = SidePool(torch.full(((len(keys) + 2) * step * GRANULE,), POISON, dtype=torch.uint8), layout)
    ids = torch.randperm(len(keys) + 1) * step + 1
    pool.view("bounds")[ids[:-1], 0] = torch.cat([keys.amin(dim=1), keys.amax(dim=1)], dim=-1)
    return pool, ids


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("width", [20, 60, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_bounds_agree_with_the_reference(group: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    pool, ids = bounded(torch.randn(9, 32, width) * torch.logspace(-3, 3, width))
    pool.view("bounds")[ids[4], 0, :width], pool.view("bounds")[ids[4], 0, width:] = torch.inf, -torch.inf
    # The last block is poison; it stands in every column that no lane uses.
    choice = torch.tensor([[[0, 1, 2], [3, 9, 9]], [[9, 9, 9], [4, 5, 6]], [[7, 8, 0], [1, 2, 9]]])
    length = torch.tensor([[96, 1], [0, 65], [96, 64]])
    entries = Entries(pool=pool, name="bounds", table=ids.int()[choice], length=length)
    q = torch.randn(3, 2 * group, width).to(dtype)
    want = reference.score_bounds(q, entries)
    assert want.isfinite().sum() == 11
    for form in forms():
        got = form.score_bounds(q, entries)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-2)


def test_bounds_are_above_every_product() -> None:
    torch.manual_seed(7)
    keys = torch.randn(4, 32, 60)
    pool, ids = bounded(keys)
    entries = Entries(pool=pool, name="bounds", table=ids[:4].int().view(1, 2, 2), length=torch.full((1, 2), 64))
    q = torch.randn(1, 6, 60)
    products = torch.einsum("hgd,hsd->hgs", q.view(2, 3, 60), keys.view(2, 64, 60))
    most = products.amax(dim=1).view(2, 2, 32).amax(dim=2)
    assert (blocks.score_bounds(q, entries)[0] >= most - 1e-4).all()
    none = Entries(pool=pool, name="bounds", table=ids[:0].int().view(1, 2, 0), length=torch.zeros(1, 2))
    assert blocks.score_bounds(q, none).shape == (1, 2, 0)


def test_a_refusal_names_what_to_do() -> None:
    pool, ids = make_pool(Format.INT4)
    slot = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match=r"int4.*encode_blocks"):
        blocks.write_slots(pool, ids[:1], slot, torch.zeros(1, 60), torch.zeros(1, 20))
    with pytest.raises(UnsupportedError, match=r"int4.*encode_blocks"):
        blocks.copy_slots(pool, (ids[:1], slot), (ids[:1], slot))
    with pytest.raises(ConfigError, match=r"keys of shape \[1, 31, 60\].*\[1, 32, 60\]"):
        blocks.encode_blocks(pool, ids[:1], torch.zeros(1, 31, 60), torch.zeros(1, 32, 20))


def test_the_environment_chooses_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, ids = make_pool(Format.FP16)
    monkeypatch.setenv("KVATLAS_KERNELS", "reference")
    monkeypatch.setattr(reference, "read_keys", lambda *_: "the reference")
    assert blocks.read_keys(pool, ids, torch.float32) == "the reference"
