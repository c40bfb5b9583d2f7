"""Column sums, one head and query at a time, in float64: the meaning that other forms agree with.

Shapes: T tokens of the chunk, Hq query heads, H KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvatlas.core.needs import BELOW_MEAN
from kvatlas.kernels.chunk_attention.reference import cached_entries, cached_positions, visible_keys
from kvatlas.kernels.pool import Part


def column_sums(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    past: Sequence[Part],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    reach: tuple[int, int] | None,
    tile_slots: int,
    over: str = "sum",
    heads: str = "sum",
) -> tuple[list[Tensor], Tensor]:
    """As :func:`kvatlas.kernels.column_sums.column_sums`."""
    T, Hq, _ = q.shape
    H = k.shape[1]
    slots = [part.table.shape[-1] * part.pool.layout.block_size for part in past]
    sums = [torch.zeros(H, n, dtype=torch.float64, device=q.device) for n in (*slots, T)]
    group = Hq // H
    for h in range(H):
        keys = [*cached_entries(past, h, q.dtype)[0], k[:, h].to(q.dtype)]
        key_positions = torch.cat([*cached_positions(past, h), positions])
        counts = [len(each) for each in keys]
        for t in range(T):
            seen = visible_keys(key_positions, int(positions[t]), window, reach).nonzero().flatten()
            paid = torch.zeros(group, sum(counts), dtype=torch.float64, device=q.device)
            for g, head in enumerate(range(h * group, (h + 1) * group)):
                score = torch.cat(keys).double()[seen] @ q[t, head].double() * scale
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                paid[g, seen] = torch.exp(score - lse[head, t].double())
            of_query = paid.amax(dim=0) if heads == "max" else paid.sum(dim=0) / (group if heads == "mean" else 1)
            if over == "below_mean":
                below = torch.zeros_like(of_query)
                below[seen] = (of_query[seen] * len(seen) < BELOW_MEAN).double()
                of_query = below
            for total, received in zip(sums, torch.split(of_query, counts), strict=True):
                there = total[h, : len(received)]
                there[:] = torch.maximum(there, received) if over == "max" else there + received
    return [each.float() for each in sums[:-1]], sums[-1].float()
