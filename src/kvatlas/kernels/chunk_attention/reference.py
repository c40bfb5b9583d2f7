"""Chunk attention, one head and query at a time, in float64: the meaning that other forms agree with.

Shapes: T tokens of the chunk, Hq query heads, H KV heads, C table columns, n past slots of one lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.kernels.gather import read_lane


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    pos_pool: Tensor,
    table: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    reach: tuple[int, int] | None,
    dense_start: int | None,
    tile_slots: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.chunk_attention.chunk_attention`."""
    T, Hq, _ = q.shape
    H = k.shape[1]
    out = torch.zeros(T, Hq, v.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.zeros(Hq, T, dtype=torch.float64, device=q.device)
    for head in range(Hq):
        h = head // (Hq // H)
        n = int(length[h])
        keys = torch.cat([read_lane(k_pool, table[h], n).to(q.dtype), k[:, h].to(q.dtype)]).double()
        values = torch.cat([read_lane(v_pool, table[h], n).to(q.dtype), v[:, h].to(q.dtype)]).double()
        key_positions = torch.cat([lane_positions(pos_pool, table[h], n, dense_start), positions])
        for t in range(T):
            seen = visible_keys(key_positions, int(positions[t]), window, reach)
            score = keys[seen] @ q[t, head].double() * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sinks is not None:
                score = torch.cat([score, sinks[head].double().reshape(1)])
            lse[head, t] = torch.logsumexp(score, dim=0)
            out[t, head] = torch.softmax(score, dim=0)[: int(seen.sum())] @ values[seen]
    return out.to(q.dtype), lse.float()


def lane_positions(pos_pool: Tensor, table: Tensor, length: int, dense_start: int | None) -> Tensor:
    """Return the positions [length] of one lane's slots, -1 for a slot without a token."""
    if dense_start is None:
        return read_lane(pos_pool, table, length)
    return torch.arange(dense_start, dense_start + length, device=table.device)


def visible_keys(key_positions: Tensor, position: int, window: int | None, reach: tuple[int, int] | None) -> Tensor:
    """Return which keys a query at ``position`` sees, bool in the shape of ``key_positions``."""
    seen = (key_positions >= 0) & (key_positions <= position)
    if window is not None:
        seen &= key_positions > position - window
    if reach is not None:
        sink_tokens, recent = reach
        seen &= (key_positions < sink_tokens) | (key_positions > position - recent)
    return seen
