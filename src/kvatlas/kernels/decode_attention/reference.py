"""Decode attention, one sequence and head at a time, in float64: the meaning that other forms agree with.

Shapes: R sequences, Hq query heads, H KV heads, C table columns, n slots of one lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.core.errors import ConfigError
from kvatlas.kernels.gather import read_lane


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    pos_pool: Tensor | None,
    query_position: Tensor | None,
    mask: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`kvatlas.kernels.decode_attention.decode_attention`."""
    R, Hq, _ = q.shape
    H, C = table.shape[1:]
    out = torch.zeros(R, Hq, v_pool.shape[-1], dtype=torch.float64, device=q.device)
    mass = torch.zeros(R, H, C * k_pool.shape[1], dtype=torch.float64, device=q.device)
    for r in range(R):
        for head in range(Hq):
            h = head // (Hq // H)
            n = int(length[r, h])
            seen = torch.ones(n, dtype=torch.bool, device=q.device)
            if mask is not None:
                seen &= mask[r, h, :n] == 0
            elif pos_pool is not None:
                position = read_lane(pos_pool, table[r, h], n)
                seen &= position >= 0
                if window is not None:
                    if query_position is None:
                        raise ConfigError(f"window={window} compares positions; pass query_position as well")
                    seen &= position > int(query_position[r]) - window
            elif window is not None:
                raise ConfigError(f"window={window} compares positions; pass pos_pool as well")
            slots = seen.nonzero().flatten()
            k = read_lane(k_pool, table[r, h], n)[slots].double()
            v = read_lane(v_pool, table[r, h], n)[slots].double()
            score = k @ q[r, head].double() * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sinks is not None:
                score = torch.cat([score, sinks[head].double().reshape(1)])
            probability = torch.softmax(score, dim=0)[: len(slots)]
            out[r, head] = probability @ v
            mass[r, h, slots] += probability
    return out.to(q.dtype), mass.float() if need_mass else None
