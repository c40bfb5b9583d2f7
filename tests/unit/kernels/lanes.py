"""Lanes for kernel tests: random blocks in random order, every unused number poisoned.

Shapes: H lanes, C table columns, N rows of the pool's views, s slots of a block, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kvatlas.core.layout import GRANULE, BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.pool import BlockPool, Part

STALE_POSITION = 0
"""What unused position slots hold: it would be visible to every query, if it were read."""
POISON = {
    Format.FP32: 0x7FC00000,
    Format.BF16: 0x7FC07FC0,
    Format.FP16: 0x7E007E00,
    Format.INT8: 0x7E007E00,
    Format.INT4: 0x7E007E00,
    Format.INT2: 0x7E007E00,
}
"""NaN, in every number that a format reads as a float."""


@dataclass(frozen=True)
class Lanes:
    """H lanes of one part, and what was stored in them."""

    part: Part

    @property
    def table(self) -> Tensor:
        """Block ids [H, C]."""
        return self.part.table

    @property
    def length(self) -> Tensor:
        """Slots in use [H]."""
        return self.part.length

    @property
    def k_pool(self) -> Tensor:
        """Keys [N, s, D]."""
        return self.part.pool.keys

    @property
    def v_pool(self) -> Tensor:
        """Values [N, s, E]."""
        return self.part.pool.values

    @property
    def pos_pool(self) -> Tensor:
        """Positions [N, s]."""
        return self.part.pool.positions


def make_pool(layout: BlockLayout, blocks: int) -> tuple[BlockPool, list[int]]:
    """Return a pool that holds nothing but NaN, and the ids of ``blocks`` blocks, with gaps and in random order."""
    granules = layout.block_bytes // GRANULE
    granules_in_all = blocks * (granules + 1) - 1  # the last block ends where the memory ends, for sanitizers to see
    memory = torch.full((granules_in_all * GRANULE // 4,), POISON[layout.format], dtype=torch.int32)
    pool = BlockPool(memory.view(torch.uint8), layout)
    return pool, (torch.randperm(blocks) * (granules + 1)).tolist()


def make_lanes(
    lengths: Sequence[int],
    *,
    key_dim: int = 32,
    value_dim: int | None = None,
    block_size: int = 8,
    format: Format = Format.FP32,
    dense_start: int | None = None,
    end: int | None = None,
    columns: int | None = None,
    hide_empty: bool = False,
) -> Lanes:
    """Positions are dense from ``dense_start``, or a random subset of [0, end) in random order.

    Packed formats hold random codes and parameters in every block of a lane: half-filled blocks are full of them.
    The part does not say that it is dense: pass ``dense_start`` to :func:`dense` for that.
    """
    D, E = key_dim, value_dim or key_dim
    layout = BlockLayout(key_dim=D, value_dim=E, format=format, block_size=block_size)
    C = columns or max(1, -(-max(lengths) // block_size))
    pool, ids = make_pool(layout, len(lengths) * C + 1)
    table = torch.full((len(lengths), C), ids.pop(), dtype=torch.int32)
    for h, n in enumerate(lengths):
        if dense_start is None:
            positions = torch.randperm(max(n, end or 2 * n))[:n]
        else:
            positions = torch.arange(dense_start, dense_start + n)
        for column in range(-(-n // block_size)):
            block = ids.pop()
            table[h, column] = block
            own = positions[column * block_size : (column + 1) * block_size]
            fill(pool, block, len(own))
            pool.positions[block] = STALE_POSITION
            pool.positions[block, : len(own)] = own.int()
    length = torch.tensor(lengths, dtype=torch.int64)
    return Lanes(Part(pool=pool, table=table, length=length, hide_empty=hide_empty))


def dense(lanes: Lanes, dense_start: int | None) -> Lanes:
    """Return the lanes with the promise that their slots are in order from a position."""
    return Lanes(replace(lanes.part, dense_start=dense_start))


def fill(pool: BlockPool, block: int, count: int) -> None:
    """Write random keys and values to the first ``count`` slots of a block."""
    layout = pool.layout
    D, E = layout.key_dim, layout.value_dim
    if layout.format.is_float:
        pool.keys[block, :count] = torch.randn(count, D).to(pool.keys.dtype)
        pool.values[block, :count] = torch.randn(count, E).to(pool.values.dtype)
    elif layout.format is Format.INT8:
        for codes, scales in ((pool.keys, pool.key_params), (pool.values, pool.value_params)):
            codes[block, :count] = torch.randint(-127, 128, (count, codes.shape[-1])).to(torch.int8)
            scales[block, :count] = torch.rand(count).half() / 60
    else:
        levels = 2**layout.format.bits - 1
        for codes, params in ((pool.key_codes, pool.key_params), (pool.value_codes, pool.value_params)):
            codes[block] = torch.randint(0, 256, (codes.shape[-1],)).to(torch.uint8)
            params[block, 0] = (torch.rand(params.shape[2:]) * 4 / levels).half()
            params[block, 1] = (torch.rand(params.shape[2:]) - 2.5).half()
        pool.value_params[block, :, :, count:] = torch.nan


def read(pool: Tensor, lanes: Lanes, h: int) -> Tensor:
    """Return the entries in use of one lane [n, ..]."""
    n = int(lanes.length[h])
    return pool[lanes.table[h].long()].flatten(0, 1)[:n]


def close(got: Any, want: Any, *, atol: float = 2e-5, rtol: float = 2e-4, form: Any = None) -> None:
    """Compare numbers; a failure names the form that gave them."""
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol, msg=lambda text: f"{form}: {text}" if form else text)


def peak_bytes(call: Any) -> int:
    """Return the most bytes that ``call`` held beyond what was there before it, workspaces of kernels included."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    return max(_held(record))


def _held(record: Any) -> Iterator[int]:
    held = 0
    yield held
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        yield held
