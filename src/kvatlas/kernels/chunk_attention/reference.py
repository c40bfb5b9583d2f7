"""Chunk attention, one head and query at a time, in float64: the meaning that other forms agree with.

Shapes: T tokens of the chunk, Hq query heads, H KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvatlas.kernels.lane import lane_keys, lane_positions, lane_values
from kvatlas.kernels.pool import Part


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    past: Sequence[Part],
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    reach: tuple[int, int] | None,
    tile_slots: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.chunk_attention.chunk_attention`."""
    T, Hq, _ = q.shape
    H = k.shape[1]
    out = torch.zeros(T, Hq, v.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.zeros(Hq, T, dtype=torch.float64, device=q.device)
    for head in range(Hq):
        h = head // (Hq // H)
        cached_k, cached_v = cached_entries(past, h, q.dtype)
        keys = torch.cat([*cached_k, k[:, h].to(q.dtype)]).double()
        values = torch.cat([*cached_v, v[:, h].to(q.dtype)]).double()
        key_positions = torch.cat([*cached_positions(past, h), positions])
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


def cached_entries(past: Sequence[Part], head: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the keys and the values of each part's slots of one lane, as a query of ``dtype`` sees them."""
    lanes = [(part.pool, part.table[head], _slots(part, head)) for part in past]
    return [lane_keys(*lane).to(dtype) for lane in lanes], [lane_values(*lane).to(dtype) for lane in lanes]


def cached_positions(past: Sequence[Part], head: int) -> list[Tensor]:
    """Return the positions of each part's slots of one lane, -1 for a slot without a token."""
    return [lane_positions(part, part.table[head], _slots(part, head)) for part in past]


def _slots(part: Part, head: int) -> Tensor:
    return torch.arange(int(part.length[head]), device=part.table.device)


def visible_keys(key_positions: Tensor, position: int, window: int | None, reach: tuple[int, int] | None) -> Tensor:
    """Return which keys a query at ``position`` sees, bool in the shape of ``key_positions``."""
    seen = (key_positions >= 0) & (key_positions <= position)
    if window is not None:
        seen &= key_positions > position - window
    if reach is not None:
        sink_tokens, recent = reach
        seen &= (key_positions < sink_tokens) | (key_positions > position - recent)
    return seen
