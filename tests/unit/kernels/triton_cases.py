"""What the Triton forms must do, on whatever device: the interpreter's CPU, or a GPU. Used by two test modules.

The measure is float64 attention over the decoded blocks. Unlike the CPU forms, the Triton forms do not round queries to
8 bits for packed formats, so they are compared with plain numbers.
Shapes: R sequences, H KV heads, G query heads of each, C table columns, S slots of a lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvatlas.core.layout import GRANULE, BlockLayout
from kvatlas.core.streams import SideLayout, Stream
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import torch_path as blocks
from kvatlas.kernels.pool import BlockPool, Entries, Part, SidePool


@dataclass(frozen=True)
class Case:
    """One call of decode attention: formats and lengths [R][H] of each part, and options."""

    formats: tuple[Format, ...]
    lengths: tuple[Any, ...]
    dtype: torch.dtype = torch.float32
    group: int = 2
    key_dim: int = 32
    value_dim: int = 32
    block_size: int = 32
    hide_empty: bool = False
    dense_start: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    with_sinks: bool = False
    slots: int = 0


def make_part(case: Case, index: int, device: str) -> Part:
    """Return blocks in random order; every byte that no block owns, and every unused slot, is poison."""
    length = torch.tensor(case.lengths[index])
    R, H = length.shape
    format = case.formats[index]
    layout = BlockLayout(
        key_dim=case.key_dim,
        value_dim=case.value_dim,
        format=format,
        block_size=32 if format.is_packed else case.block_size,
    )
    size = layout.block_size
    C = max(1, -(-int(length.max()) // size))
    N = R * H * C + 1
    pool = BlockPool(torch.full((N * layout.block_bytes,), 0xFF, dtype=torch.uint8), layout)
    ids = (torch.randperm(N - 1) + 1) * (layout.block_bytes // GRANULE)
    k, v = torch.randn(len(ids), size, case.key_dim), torch.randn(len(ids), size, case.value_dim)
    k, v = (x.bfloat16() if format is Format.BF16 else x for x in (k, v))  # the interpreter rounds otherwise
    blocks.encode_blocks(pool, ids, k, v)
    slot = torch.arange(C * size)
    at = torch.stack([slot if case.dense_start is not None else torch.randperm(C * size) for _ in range(R * H)])
    pool.positions[ids] = (at + (case.dense_start or 0)).int().view(-1, size)
    table = ids.view(R, H, C)
    poison(pool, table, length, hide=case.hide_empty)
    return Part(
        pool=BlockPool(pool.memory.to(device), layout),
        table=table.int().to(device),
        length=length.to(device),
        hide_empty=case.hide_empty,
        dense_start=case.dense_start,
    )


def poison(pool: BlockPool, table: Tensor, length: Tensor, *, hide: bool) -> None:
    """Spoil what no query may see: slots past the length, every fifth slot if ``hide``."""
    R, H, C = table.shape
    size = pool.layout.block_size
    slots = torch.arange(C * size)
    unused = (slots >= length[..., None]).view(R, H, C, size)
    empty = unused | (slots % 5 == 3).view(C, size) if hide else unused
    if hide:
        pool.positions[table[..., None].expand(R, H, C, size)[empty], torch.arange(size).expand_as(empty)[empty]] = -1
    block, offset = table[..., None].expand_as(empty)[empty], torch.arange(size).expand_as(empty)[empty]
    if pool.layout.format.is_float:
        pool.keys[block, offset] = pool.values[block, offset] = torch.nan
    elif pool.layout.format is Format.INT8:
        pool.key_params[block, offset] = pool.value_params[block, offset] = torch.nan
    else:
        pool.value_params[block, :, :, offset] = torch.nan


def attend(q: Tensor, parts: Sequence[Part], case: Case, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Return float64 attention over the decoded blocks, and the mass of each part; all on the CPU."""
    R, Hq, _ = q.shape
    H = parts[0].table.shape[1]
    softcap, sinks, window = (options.get(name) for name in ("softcap", "sinks", "window"))
    scores, values = [], []
    for part in parts:
        pool = BlockPool(part.pool.memory.cpu(), part.pool.layout)
        table = part.table.cpu()
        k, v = (read(pool, table, torch.float32).double() for read in (blocks.read_keys, blocks.read_values))
        position = pool.positions[table.long()].view(R, H, -1)
        if options.get("slots") is not None:
            slots = options["slots"].cpu().long()
            k, v = (x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
            position = position.gather(2, slots)
        seen = torch.arange(k.shape[2]) < part.length.cpu()[..., None]
        if part.hide_empty:
            seen &= position >= 0
        if window is not None:
            seen &= position > options["query_position"].cpu().view(-1, 1, 1) - window
        k, v = torch.where(seen[..., None], k, 0), torch.where(seen[..., None], v, 0)
        s = torch.einsum("rhgd,rhsd->rhgs", q.cpu().double().view(R, H, Hq // H, -1), k) * options["scale"]
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        scores.append(s.masked_fill(~seen[:, :, None], -math.inf))
        values.append(v)
    s = torch.cat(scores, -1)
    extra = 0
    if sinks is not None:
        s = torch.cat([s, sinks.cpu().double().view(1, H, -1, 1).expand(R, -1, -1, -1)], -1)
        extra = 1
    weights = torch.softmax(s, -1).nan_to_num(0)[..., : s.shape[-1] - extra]
    out = torch.einsum("rhgs,rhse->rhge", weights, torch.cat(values, 2)).reshape(R, Hq, -1)
    return out, list(weights.sum(2).split([x.shape[-1] for x in scores], -1))


def check_decode(case: Case, device: str) -> None:
    """Compare the Triton form with float64 attention."""
    from kvatlas.kernels.decode_attention import triton_path

    torch.manual_seed(0)
    parts = [make_part(case, index, device) for index in range(len(case.formats))]
    R, H, C = parts[0].table.shape
    q = torch.randn(R, H * case.group, case.key_dim).to(case.dtype).to(device)
    options = {"scale": case.key_dim**-0.5} | case.options
    if "window" in options:
        options["query_position"] = (case.dense_start or 0) + torch.tensor(case.lengths[-1]).amax(1).to(device)
    if case.with_sinks:
        options["sinks"] = torch.randn(H * case.group, device=device)
    if case.slots:
        most = C * parts[0].pool.layout.block_size
        order = torch.stack([torch.randperm(most)[: case.slots] for _ in range(R * H)])
        options["slots"] = order.view(R, H, -1).int().to(device)
        parts = [replace(parts[0], length=torch.randint(1, case.slots, (R, H)).to(device))]
    assert triton_path.why_not(q, parts, options.get("slots")) is None
    out, mass = triton_path.decode_attention(q, parts, need_mass=True, **options)
    want, want_mass = attend(q, parts, case, **options)
    exact = case.dtype == torch.float32
    loose = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[case.dtype]
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.cpu().double(), want, atol=loose, rtol=loose)
    assert mass is not None
    for got, expected in zip(mass, want_mass, strict=True):
        close = 2e-5 if exact else 2e-3 * case.group
        torch.testing.assert_close(got.cpu().double(), expected, atol=close, rtol=close)
    plain, nothing = triton_path.decode_attention(q, parts, **options)
    assert nothing is None
    torch.testing.assert_close(plain, out, atol=loose, rtol=loose)  # a window may start elsewhere without the mass


RAGGED = [[70, 1], [0, 33]]
FORMATS = tuple(Format)

DECODE_CASES = {
    **{f"{format.value} exact": Case((format,), (RAGGED,), key_dim=42, value_dim=70, group=3) for format in FORMATS},
    **{f"{format.value} half": Case((format,), (RAGGED,), dtype=torch.float16, hide_empty=True) for format in FORMATS},
    "int8 half, no whole words": Case((Format.INT8,), (RAGGED,), dtype=torch.float16, key_dim=42, value_dim=70),
    "bf16": Case((Format.BF16,), (RAGGED,), dtype=torch.bfloat16, key_dim=64),
    "int4 bf16": Case((Format.INT4,), (RAGGED,), dtype=torch.bfloat16, key_dim=64, value_dim=64, group=16),
    "two parts": Case(
        (Format.INT2, Format.FP16),
        (RAGGED, [[3, 40], [0, 16]]),
        hide_empty=True,
        options={"window": 40},
        with_sinks=True,
    ),
    "capped window": Case(
        (Format.INT4,),
        ([[300, 150]],),
        group=1,
        dense_start=7,
        options={"window": 100, "softcap": 2.0},
        with_sinks=True,
    ),
    "small blocks": Case((Format.FP32,), (RAGGED,), block_size=4, options={"softcap": 3.0, "window": 30}, group=5),
    "dense": Case((Format.INT8,), ([[1100, 1000]],), dense_start=0, options={"window": 300}),
    "slots": Case((Format.INT8,), ([[64, 64]],), slots=40),
    "empty": Case((Format.INT4,), ([[0, 0]],)),
}


def check_blocks(format: Format, device: str, key_dim: int, value_dim: int) -> None:
    """Encoding is bit for bit that of torch; decoding agrees."""
    from kvatlas.kernels.blocks import triton_path

    torch.manual_seed(0)
    layout = BlockLayout(key_dim=key_dim, value_dim=value_dim, format=format)
    memory = torch.full((5 * layout.block_bytes,), 0xFF, dtype=torch.uint8)
    want, got = BlockPool(memory.clone(), layout), BlockPool(memory.to(device), layout)
    ids = torch.tensor([3, 0, 4]) * (layout.block_bytes // GRANULE)
    k = torch.randn(3, 32, key_dim) * torch.logspace(-3, 3, key_dim)
    v = torch.randn(3, 32, value_dim)
    k[0, :, 3], v[1, 4] = 7, 0
    k, v = (x.bfloat16() if format is Format.BF16 else x for x in (k, v))
    blocks.encode_blocks(want, ids, k, v)
    triton_path.encode_blocks(got, ids.to(device), k.to(device), v.to(device))
    assert torch.equal(got.memory.cpu(), want.memory)
    table = ids.int().view(3, 1)
    for name in ("read_keys", "read_values"):
        read = getattr(triton_path, name)(got, table.to(device), torch.float32)
        torch.testing.assert_close(read.cpu(), getattr(blocks, name)(want, table, torch.float32), rtol=1e-6, atol=1e-6)


def make_bounds(width: int, device: str) -> Entries:
    """Return the bounds of [2, 2] lanes of up to three blocks, one of which has none, behind another stream."""
    bounds = Stream(name="bounds", width=2 * width, every=None)
    layout = SideLayout((Stream(name="other", width=3, dtype="uint8"), bounds), 32)
    pool = SidePool(torch.full((5 * layout.block_bytes,), 0xFF, dtype=torch.uint8), layout)
    ids = torch.tensor([3, 0, 4]) * (layout.block_bytes // GRANULE)
    low = torch.randn(3, width)
    pool.view("bounds")[ids, 0] = torch.cat([low, low + torch.rand(3, width)], dim=-1)
    pool.view("bounds")[ids[1]] = torch.tensor([torch.inf, -torch.inf]).repeat_interleave(width)
    length = torch.tensor([[96, 64], [33, 0]])
    table = ids.int().to(device).expand(2, 2, 3)
    return Entries(pool=SidePool(pool.memory.to(device), layout), name="bounds", table=table, length=length.to(device))


def check_bounds(device: str, width: int) -> None:
    """The most that a query can score in a block, as the reference says."""
    from kvatlas.kernels.blocks import reference, triton_path

    torch.manual_seed(0)
    q, there = torch.randn(2, 6, width), make_bounds(width, device)
    pool = SidePool(there.pool.memory.cpu(), there.pool.layout)
    here = replace(there, pool=pool, table=there.table.cpu(), length=there.length.cpu())
    want = reference.score_bounds(q, here)
    assert want.isfinite().any() and want.isneginf().any()
    torch.testing.assert_close(triton_path.score_bounds(q.to(device), there).cpu(), want, rtol=1e-5, atol=1e-3)


def check_column_sums(format: Format, device: str, dtype: torch.dtype, **options: Any) -> None:
    """Two parts, one of them in float32, and the chunk itself."""
    from kvatlas.kernels.column_sums import reference, triton_path

    torch.manual_seed(0)
    case = Case((format, Format.FP32), (RAGGED[:1], [[20, 5]]), hide_empty=True)
    parts = [make_part(case, index, "cpu") for index in range(2)]
    past = [Part(pool=part.pool, table=part.table[0], length=part.length[0], hide_empty=True) for part in parts]
    q, k = torch.randn(9, 6, 32).to(dtype), torch.randn(9, 2, 32).to(dtype)
    positions, lse = torch.arange(60, 69), torch.rand(6, 9) + 4
    settings = {"scale": 0.2, "softcap": None, "window": None, "reach": None} | options
    want, want_own = reference.column_sums(q, k, positions, lse, past, tile_slots=64, **settings)
    past = [
        Part(
            pool=BlockPool(part.pool.memory.to(device), part.pool.layout),
            table=part.table.to(device),
            length=part.length.to(device),
        )
        for part in past
    ]
    sums, own = triton_path.column_sums(
        *(x.to(device) for x in (q, k, positions, lse)), past, tile_slots=64, **settings
    )
    close = 1e-4 if dtype == torch.float32 else 2e-2
    for got, expected in zip([*sums, own], [*want, want_own], strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=close, atol=close)
