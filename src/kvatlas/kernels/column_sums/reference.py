"""Column sums, one head and query at a time, in float64: the meaning that other forms agree with.

Shapes: T tokens of the chunk, Hq query heads, H KV heads, C table columns, n past slots of one lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.kernels.chunk_attention.reference import lane_positions, visible_keys
from kvatlas.kernels.gather import read_lane


def column_sums(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    k_pool: Tensor,
    pos_pool: Tensor,
    table: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    reach: tuple[int, int] | None,
    dense_start: int | None,
    tile_slots: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.column_sums.column_sums`."""
    T, Hq, _ = q.shape
    H, C = table.shape
    past = torch.zeros(H, C * k_pool.shape[1], dtype=torch.float64, device=q.device)
    own = torch.zeros(H, T, dtype=torch.float64, device=q.device)
    for head in range(Hq):
        h = head // (Hq // H)
        n = int(length[h])
        keys = torch.cat([read_lane(k_pool, table[h], n).to(q.dtype), k[:, h].to(q.dtype)]).double()
        key_positions = torch.cat([lane_positions(pos_pool, table[h], n, dense_start), positions])
        for t in range(T):
            seen = visible_keys(key_positions, int(positions[t]), window, reach).nonzero().flatten()
            score = keys[seen] @ q[t, head].double() * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            probability = torch.exp(score - lse[head, t].double())
            is_past = seen < n
            past[h, seen[is_past]] += probability[is_past]
            own[h, seen[~is_past] - n] += probability[~is_past]
    return past.float(), own.float()
