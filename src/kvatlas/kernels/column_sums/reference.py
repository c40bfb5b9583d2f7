"""Column sums, one head and query at a time, in float64: the meaning that other forms agree with.

Shapes: T tokens of the chunk, Hq query heads, H KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
) -> tuple[list[Tensor], Tensor]:
    """As :func:`kvatlas.kernels.column_sums.column_sums`."""
    T, Hq, _ = q.shape
    H = k.shape[1]
    slots = [part.table.shape[-1] * part.pool.layout.block_size for part in past]
    sums = [torch.zeros(H, n, dtype=torch.float64, device=q.device) for n in (*slots, T)]
    for head in range(Hq):
        h = head // (Hq // H)
        keys = [*cached_entries(past, h, q.dtype)[0], k[:, h].to(q.dtype)]
        key_positions = torch.cat([*cached_positions(past, h), positions])
        counts = [len(each) for each in keys]
        for t in range(T):
            seen = visible_keys(key_positions, int(positions[t]), window, reach).nonzero().flatten()
            score = torch.cat(keys).double()[seen] @ q[t, head].double() * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            probability = torch.zeros(sum(counts), dtype=torch.float64, device=q.device)
            probability[seen] = torch.exp(score - lse[head, t].double())
            for total, received in zip(sums, torch.split(probability, counts), strict=True):
                total[h, : len(received)] += received
    return [each.float() for each in sums[:-1]], sums[-1].float()
