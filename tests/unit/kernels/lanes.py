"""Lanes for kernel tests: random blocks in random order, every unused number poisoned.

Shapes: H lanes, C table columns, N blocks of the pool, s slots of a block, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

STALE_POSITION = 0
"""What unused position slots hold: it would be visible to every query, if it were read."""


@dataclass(frozen=True)
class Lanes:
    k_pool: Tensor
    v_pool: Tensor
    pos_pool: Tensor
    table: Tensor
    length: Tensor


def make_lanes(
    lengths: Sequence[int],
    *,
    key_dim: int = 32,
    value_dim: int | None = None,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    dense_start: int | None = None,
    end: int | None = None,
    columns: int | None = None,
) -> Lanes:
    """Positions are dense from ``dense_start``, or a random subset of [0, end) in random order."""
    D, E = key_dim, value_dim or key_dim
    C = columns or max(1, -(-max(lengths) // block_size))
    N = len(lengths) * C + 1
    # Both pools are views into one arena, whose blocks are longer than either needs.
    arena = torch.full((N, block_size * (D + E) + 24), torch.nan, dtype=dtype)
    stride = arena.stride(0)
    k_pool = arena.as_strided((N, block_size, D), (stride, D, 1))
    v_pool = arena.as_strided((N, block_size, E), (stride, E, 1), block_size * D)
    pos_pool = torch.full((N, block_size), STALE_POSITION, dtype=torch.int32)
    table = torch.zeros(len(lengths), C, dtype=torch.int32)
    ids = iter((torch.randperm(N - 1) + 1).tolist())
    for h, n in enumerate(lengths):
        if dense_start is None:
            positions = torch.randperm(max(n, end or 2 * n))[:n]
        else:
            positions = torch.arange(dense_start, dense_start + n)
        for column in range(-(-n // block_size)):
            block = next(ids)
            table[h, column] = block
            part = positions[column * block_size : (column + 1) * block_size]
            k_pool[block, : len(part)] = torch.randn(len(part), D).to(dtype)
            v_pool[block, : len(part)] = torch.randn(len(part), E).to(dtype)
            pos_pool[block, : len(part)] = part.int()
    return Lanes(k_pool, v_pool, pos_pool, table, torch.tensor(lengths, dtype=torch.int32))


def read(pool: Tensor, lanes: Lanes, h: int) -> Tensor:
    n = int(lanes.length[h])
    return pool[lanes.table[h].long()].flatten(0, 1)[:n]


def close(got: Any, want: Any, *, atol: float = 2e-5, rtol: float = 2e-4) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


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
