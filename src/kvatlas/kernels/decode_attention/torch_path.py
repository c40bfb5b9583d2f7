"""Decode attention in few torch operations: gather the lanes, two batched products around a softmax.

On the CPU this is about as fast as torch's flash attention over contiguous lanes, and gives probabilities.
Shapes: R sequences, Hq query heads, H KV heads, L = R * H lanes, G query heads per KV head, C table columns,
S = C * block_size slots, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from kvatlas.kernels.gather import SlotBuffer
from kvatlas.kernels.visibility import slot_mask

CPU_BUFFER_BYTES = 1 << 20
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
    dtype = torch.promote_types(q.dtype, torch.float32)
    if C == 0:
        mass = torch.zeros(R, H, 0, device=q.device) if need_mass else None
        return q.new_zeros(R, Hq, v_pool.shape[-1]), mass
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
    num_lanes, num_columns = _step(k_pool, L, C, dtype)
    keys, values = (SlotBuffer(pool, num_lanes * num_columns, dtype) for pool in (k_pool, v_pool))
    results = [
        _attend_lanes(*lanes, keys, values, num_columns, scale=scale, softcap=softcap, need_mass=need_mass)
        for lanes in zip(
            _split(q.to(dtype).reshape(L, G, D), num_lanes, 0),
            _split(table.reshape(L, C), num_lanes, 0),
            repeat(None) if mask is None else _split(mask.to(dtype).reshape(L, S), num_lanes, 0),
            repeat(None) if sinks is None else _split(sinks.to(dtype).view(H, G, 1).repeat(R, 1, 1), num_lanes, 0),
            strict=False,
        )
    ]
    out = torch.cat([out_LGE for out_LGE, _ in results]).view(R, Hq, -1).to(q.dtype)
    if not need_mass:
        return out, None
    return out, torch.cat([mass_LS for _, mass_LS in results if mass_LS is not None]).view(R, H, S).float()


def _step(pool: Tensor, num_lanes: int, num_columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many lanes, and how many columns of them, to gather at a time: whole lanes if one fits."""
    limit = CPU_BUFFER_BYTES if pool.device.type == "cpu" else DEVICE_BUFFER_BYTES
    blocks = max(1, limit // (pool.shape[1] * pool.shape[2] * dtype.itemsize))
    return max(1, min(num_lanes, blocks // num_columns)), min(num_columns, blocks)


def _attend_lanes(
    q_LGD: Tensor,
    table_LC: Tensor,
    mask_LS: Tensor | None,
    sinks_LG1: Tensor | None,
    keys: SlotBuffer,
    values: SlotBuffer,
    num_columns: int,
    *,
    scale: float,
    softcap: float | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [L, G, E] of some lanes, and their mass [L, S] if needed, by runs of ``num_columns``."""
    L, G, _ = q_LGD.shape
    num_slots = num_columns * keys.block_size
    slots = table_LC.shape[1] * keys.block_size
    scores_LGS = torch.empty(L, G, slots, dtype=q_LGD.dtype, device=q_LGD.device)
    runs = [
        (columns, scores, mask, None if mask is None else _hidden_slots(mask))
        for columns, scores, mask in zip(
            _split(table_LC, num_columns, 1),
            _split(scores_LGS, num_slots, 2),
            repeat(None) if mask_LS is None else _split(mask_LS, num_slots, 1),
            strict=False,
        )
    ]
    for columns, scores, mask, hidden in runs:
        k = keys.read(columns)
        _clear(k, hidden)
        if mask is None or softcap is not None:
            torch.baddbmm(scores, q_LGD, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        else:
            torch.baddbmm(mask.unsqueeze(1), q_LGD, k.transpose(1, 2), alpha=scale, out=scores)
    if softcap is not None:
        scores_LGS.div_(softcap).tanh_().mul_(softcap)
        if mask_LS is not None:
            scores_LGS += mask_LS.unsqueeze(1)
    weights_LGS = _softmax(scores_LGS, mask_LS, sinks_LG1)
    out_LGE = torch.empty(L, G, values.width, dtype=q_LGD.dtype, device=q_LGD.device)
    for index, weights in enumerate(_split(weights_LGS, num_slots, 2)):
        columns, _, _, hidden = runs[index]
        v = values.read(columns)
        _clear(v, hidden)
        torch.baddbmm(out_LGE, weights, v, beta=min(index, 1), out=out_LGE)
    return out_LGE, weights_LGS.sum(dim=1) if need_mass else None


def _split(tensor: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """Return ``tensor`` in runs of ``size`` along ``dim``; free where one run is enough, as it mostly is."""
    if tensor.shape[dim] <= size:
        return (tensor,)
    return tensor.tensor_split(tuple(range(size, tensor.shape[dim], size)), dim)


def _softmax(scores_LGS: Tensor, mask_LS: Tensor | None, sinks_LG1: Tensor | None) -> Tensor:
    """Return the probability of each slot, zeros for a lane that sees nothing."""
    if sinks_LG1 is not None:
        return torch.softmax(torch.cat([scores_LGS, sinks_LG1], dim=-1), dim=-1)[..., :-1]
    weights = torch.softmax(scores_LGS, dim=-1)
    if mask_LS is not None:
        weights.masked_fill_(mask_LS.all(dim=-1).view(-1, 1, 1), 0)
    return weights


def _hidden_slots(mask_LS: Tensor) -> Tensor:
    """Return which slots are hidden: on the CPU the numbers of the few, elsewhere a mask, to wait for nothing."""
    return mask_LS.reshape(-1).nonzero().view(-1) if mask_LS.device.type == "cpu" else mask_LS.bool()


def _clear(entries_LSD: Tensor, hidden: Tensor | None) -> None:
    """Write zeros over hidden slots: they may hold NaN, which neither -inf nor a weight of 0 would hide."""
    if hidden is None:
        return
    if hidden.dtype == torch.bool:
        entries_LSD.masked_fill_(hidden.unsqueeze(-1), 0)
    else:
        entries_LSD.view(-1, entries_LSD.shape[-1]).index_fill_(0, hidden, 0)
