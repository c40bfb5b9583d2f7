"""Decode attention in few torch operations: gather the lanes, two batched products around a softmax.

On the CPU this equals the speed of torch's flash attention at decode shapes, and the probabilities come for
free.
Shapes: R sequences, Hq query heads, H KV heads, L = R * H lanes, G query heads per KV head, C table columns,
S = C * block_size slots, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvatlas.kernels.gather import SlotBuffer
from kvatlas.kernels.visibility import slot_mask

CPU_BUFFER_BYTES = 512 << 10
"""Keys, and values, to gather at a time on the CPU: what was just written should still be in its cache."""

DEVICE_BUFFER_BYTES = 256 << 20
"""The same elsewhere, where launches cost more than memory."""


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
    R, Hq, D = q.shape
    H, C = table.shape[1:]
    block_size = k_pool.shape[1]
    S, L, G = C * block_size, R * H, Hq // H
    if mask is None:
        mask = slot_mask(
            length,
            C,
            block_size,
            window=window,
            pos_pool=pos_pool,
            table=table,
            query_position=query_position,
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_LGD = (q.to(dtype) * scale).view(L, G, D)
    table_LC = table.reshape(L, C)
    mask_LS = None if mask is None else mask.view(L, S)
    sinks_LG1 = (
        None if sinks is None else sinks.to(dtype).view(1, H, G, 1).expand(R, H, G, 1).reshape(L, G, 1)
    )
    out_LGE = q_LGD.new_empty(L, G, v_pool.shape[-1])
    mass_LS = q_LGD.new_empty(L, S, dtype=torch.float32) if need_mass else None
    num_lanes, num_columns = _step(k_pool, L, C, dtype)
    keys, values = (SlotBuffer(pool, num_lanes * num_columns, dtype) for pool in (k_pool, v_pool))
    for begin in range(0, L, num_lanes):
        lanes = slice(begin, begin + num_lanes)
        q_lGD, table_lC, out_lGE = q_LGD[lanes], table_LC[lanes], out_LGE[lanes]
        mask_lS = None if mask_LS is None else mask_LS[lanes]
        scores_lGS = q_LGD.new_empty(q_lGD.shape[0], G, S)
        for columns, slots in _column_runs(C, num_columns, block_size):
            k = keys.read(table_lC[:, columns])
            if mask_lS is not None:
                _clear_hidden(mask_lS[:, slots], k)
            torch.bmm(q_lGD, k.transpose(1, 2), out=scores_lGS[:, :, slots])
        weights_lGS = _probabilities(
            scores_lGS, mask_lS, softcap, None if sinks_LG1 is None else sinks_LG1[lanes]
        )
        for columns, slots in _column_runs(C, num_columns, block_size):
            v = values.read(table_lC[:, columns])
            if mask_lS is not None:
                _clear_hidden(mask_lS[:, slots], v)
            torch.baddbmm(
                out_lGE, weights_lGS[:, :, slots], v, beta=0 if slots.start == 0 else 1, out=out_lGE
            )
        if mass_LS is not None:
            torch.sum(weights_lGS, dim=1, out=mass_LS[lanes])
    out = out_LGE.view(R, Hq, -1).to(q.dtype)
    return out, None if mass_LS is None else mass_LS.view(R, H, S)


def _step(pool: Tensor, num_lanes: int, num_columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many lanes, and how many columns of them, to gather at a time: whole lanes if one fits."""
    limit = CPU_BUFFER_BYTES if pool.device.type == "cpu" else DEVICE_BUFFER_BYTES
    blocks = max(1, limit // (pool[0].numel() * dtype.itemsize))
    return max(1, min(num_lanes, blocks // num_columns)), min(num_columns, blocks)


def _column_runs(num_columns: int, step: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Yield runs of ``step`` table columns, each with the slots it covers."""
    for begin in range(0, num_columns, step):
        end = min(begin + step, num_columns)
        yield slice(begin, end), slice(begin * block_size, end * block_size)


def _clear_hidden(mask_LS: Tensor, entries_LSD: Tensor) -> None:
    """Write zeros over hidden slots: they may hold NaN, which neither -inf nor a weight of 0 would hide."""
    hidden = mask_LS < 0
    if hidden.device.type == "cpu":
        # Few slots are hidden as a rule: finding them costs less than a pass over all entries.
        slots = hidden.view(-1).nonzero().view(-1)
        entries_LSD.view(-1, entries_LSD.shape[-1]).index_fill_(0, slots, 0)
    else:
        entries_LSD.masked_fill_(hidden.unsqueeze(-1), 0)


def _probabilities(
    scores_LGS: Tensor, mask_LS: Tensor | None, softcap: float | None, sinks_LG1: Tensor | None
) -> Tensor:
    """Return the probability of each slot [L, G, S], zeros for a lane that sees nothing; overwrites the scores."""
    if softcap is not None:
        scores_LGS.div_(softcap).tanh_().mul_(softcap)
    if mask_LS is not None:
        scores_LGS += mask_LS.unsqueeze(1)
    if sinks_LG1 is not None:
        return torch.softmax(torch.cat([scores_LGS, sinks_LG1], dim=-1), dim=-1)[..., :-1]
    weights = torch.softmax(scores_LGS, dim=-1)
    if mask_LS is not None:
        blind = (mask_LS.amax(dim=-1) < 0).view(-1, 1, 1)
        weights.masked_fill_(blind, 0)
    return weights
