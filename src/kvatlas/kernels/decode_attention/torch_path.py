"""Decode attention in few torch operations: gather the lanes, two batched products around a softmax.

On the CPU this is about as fast as torch's flash attention over contiguous lanes, and gives probabilities. Encoded
formats are decoded as they are gathered; nothing else is rounded, so over packed formats this form is nearer to exact
attention than the reference is, and agrees with it only loosely (about 2 % of the output's size).
Shapes: R sequences, Hq query heads, H KV heads, L = R * H lanes, G query heads per KV head, C table columns,
S slots of all parts, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvatlas.kernels.gather import SlotBuffer, read_entries
from kvatlas.kernels.pool import BlockPool, Part
from kvatlas.kernels.visibility import slot_mask

CPU_BUFFER_BYTES = 1 << 20
"""Keys, and values, to gather at a time on the CPU: what was just written should still be in its cache."""

DEVICE_BUFFER_BYTES = 256 << 20
"""The same elsewhere, where launches cost more than memory."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Some slots of some lanes, to gather at once.

    Args:
        keys: gathers keys [L, S, D]; valid until the next run of the part gathers.
        values: gathers values [L, S, E], likewise.
        count: S.
        mask: additive [L, S], or None.
        hidden: what :func:`_hidden_slots` says of the mask.
    """

    keys: Callable[[], Tensor]
    values: Callable[[], Tensor]
    count: int
    mask: Tensor | None
    hidden: Tensor | None


def decode_attention(
    q: Tensor,
    parts: Sequence[Part],
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_position: Tensor | None,
    slots: Tensor | None,
    need_mass: bool,
    shared: dict[Any, Any] | None,
) -> tuple[Tensor, list[Tensor] | None]:
    """As :func:`kvatlas.kernels.decode_attention.decode_attention`."""
    (R, Hq, D), H, E = q.shape, parts[0].table.shape[1], parts[0].pool.layout.value_dim
    L, G = R * H, Hq // H
    dtype = torch.promote_types(q.dtype, torch.float32)
    lanes = [_Lanes(p, _shared_mask(shared, i, p, window, query_position, slots), slots) for i, p in enumerate(parts)]
    counts = [each.count for each in lanes]
    q_LGD = q.to(dtype).reshape(L, G, D)
    sinks_LG1 = None if sinks is None else sinks.to(dtype).view(H, G, 1).repeat(R, 1, 1)
    out_LGE = torch.zeros(L, G, E, dtype=dtype, device=q.device)
    mass_LS = torch.zeros(L, sum(counts), dtype=dtype, device=q.device) if need_mass else None
    limit = CPU_BUFFER_BYTES if q.device.type == "cpu" else DEVICE_BUFFER_BYTES
    num_lanes = max(1, min(L, limit // max(1, sum(counts) * D * dtype.itemsize)))
    for each in lanes:
        each.prepare(num_lanes, limit, dtype)
    for first in range(0, L if sum(counts) else 0, num_lanes):
        some = slice(first, first + num_lanes)
        runs = [run for each in lanes for run in each.runs(some)]
        part_sinks = None if sinks_LG1 is None else sinks_LG1[some]
        weights_LGS = _attend(q_LGD[some], runs, part_sinks, out_LGE[some], scale=scale, softcap=softcap)
        if mass_LS is not None:
            torch.sum(weights_LGS, dim=1, out=mass_LS[some])
    out = out_LGE.view(R, Hq, E).to(q.dtype)
    if mass_LS is None:
        return out, None
    return out, [mass.reshape(R, H, -1).float() for mass in torch.split(mass_LS, counts, dim=1)]


class _Lanes:
    """Gathers one part of all lanes, run by run."""

    def __init__(self, part: Part, mask: Tensor | None, slots: Tensor | None) -> None:
        self._pool = part.pool
        self._size = part.pool.layout.block_size
        self._table_LC = part.table.flatten(0, 1)
        self._mask_LS = None if mask is None else mask.expand(*part.table.shape[:2], -1).flatten(0, 1)
        self._slots_LS = None if slots is None else slots.flatten(0, 1).long()
        self.count = self._table_LC.shape[1] * self._size if self._slots_LS is None else self._slots_LS.shape[1]

    def prepare(self, num_lanes: int, limit: int, dtype: torch.dtype) -> None:
        """Reserve what gathering up to ``num_lanes`` lanes at a time needs, about ``limit`` bytes."""
        layout, columns = self._pool.layout, self._table_LC.shape[1]
        self._dtype = dtype
        blocks = max(1, limit // (self._size * layout.key_dim * dtype.itemsize))
        self._num_columns = max(1, min(columns, blocks // num_lanes))
        self._buffers = None
        if layout.format.is_float and self._slots_LS is None:
            most = num_lanes * self._num_columns
            self._buffers = [SlotBuffer(pool, most, dtype) for pool in (self._pool.keys, self._pool.values)]

    def runs(self, lanes: slice) -> list[_Run]:
        """Return the runs that make up this part of some lanes."""
        mask_LS = None if self._mask_LS is None else self._mask_LS[lanes].to(self._dtype)
        if self._slots_LS is not None:
            picks = [
                partial(_pick, self._pool, which, self._table_LC[lanes], self._slots_LS[lanes], self._dtype)
                for which in ("keys", "values")
            ]
            return [self._run(picks[0], picks[1], self.count, mask_LS)]
        runs = []
        for first in range(0, self._table_LC.shape[1], self._num_columns):
            table = self._table_LC[lanes, first : first + self._num_columns]
            count = table.shape[1] * self._size
            part = None if mask_LS is None else mask_LS[:, first * self._size : first * self._size + count]
            if self._buffers is not None:
                keys, values = (partial(buffer.read, table) for buffer in self._buffers)
                runs.append(self._run(keys, values, count, part))
            else:
                runs.append(
                    self._run(
                        partial(read_entries, self._pool, "keys", table, self._dtype),
                        partial(read_entries, self._pool, "values", table, self._dtype),
                        count,
                        part,
                    )
                )
        return runs

    @staticmethod
    def _run(keys: Callable[[], Tensor], values: Callable[[], Tensor], count: int, mask: Tensor | None) -> _Run:
        hidden = None if mask is None else _hidden_slots(mask)
        return _Run(keys=keys, values=values, count=count, mask=mask, hidden=hidden)


def _attend(
    q_LGD: Tensor, runs: list[_Run], sinks_LG1: Tensor | None, out_LGE: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """Write the output of some lanes to ``out_LGE`` and return the probability of each slot [L, G, S]."""
    L, G, _ = q_LGD.shape
    counts = [run.count for run in runs]
    scores_LGS = torch.empty(L, G, sum(counts), dtype=q_LGD.dtype, device=q_LGD.device)
    for run, scores in zip(runs, torch.split(scores_LGS, counts, dim=-1), strict=True):
        k = run.keys()
        _clear(k, run.hidden)
        torch.baddbmm(scores, q_LGD, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if run.mask is not None:
            scores += run.mask.unsqueeze(1)
    weights_LGS = _softmax(scores_LGS, [run.mask for run in runs], sinks_LG1)
    for index, (run, weights) in enumerate(zip(runs, torch.split(weights_LGS, counts, dim=-1), strict=True)):
        v = run.values()
        _clear(v, run.hidden)
        torch.baddbmm(out_LGE, weights, v, beta=min(index, 1), out=out_LGE)
    return weights_LGS


def _pick(pool: BlockPool, which: Any, table_LC: Tensor, slots_LS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the entries of some slots [L, S', D]."""
    size = pool.layout.block_size
    if pool.layout.format.is_float:
        entries = pool.keys if which == "keys" else pool.values
        return entries[table_LC.gather(1, slots_LS // size).long(), slots_LS % size].to(dtype)
    all_LSD = read_entries(pool, which, table_LC, dtype)
    return all_LSD.gather(1, slots_LS.unsqueeze(-1).expand(-1, -1, all_LSD.shape[-1]))


def _shared_mask(
    shared: dict[Any, Any] | None,
    index: int,
    part: Part,
    window: int | None,
    query_position: Tensor | None,
    slots: Tensor | None,
) -> Tensor | None:
    """Return the mask of a part: kept in ``shared`` for the next layers, except where slots change with the layer."""
    if shared is None or slots is not None:
        return slot_mask(part, window=window, query_position=query_position, slots=slots)
    if (index, window) not in shared:
        shared[index, window] = slot_mask(part, window=window, query_position=query_position)
    mask: Tensor | None = shared[index, window]
    return mask


def _softmax(scores_LGS: Tensor, masks: Sequence[Tensor | None], sinks_LG1: Tensor | None) -> Tensor:
    """Return the probability of each slot, zeros for a lane that sees nothing."""
    if sinks_LG1 is not None:
        return torch.softmax(torch.cat([scores_LGS, sinks_LG1], dim=-1), dim=-1)[..., :-1]
    weights = torch.softmax(scores_LGS, dim=-1)
    known = [mask for mask in masks if mask is not None]
    if len(known) == len(masks):
        weights.masked_fill_(torch.stack([mask.all(dim=-1) for mask in known]).all(dim=0).view(-1, 1, 1), 0)
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
