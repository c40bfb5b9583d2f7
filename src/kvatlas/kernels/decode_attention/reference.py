"""Decode attention, one sequence and head at a time, in float64: the meaning that other forms agree with.

Packed formats are read by integer dot products, which need integers on both sides. For keys, a query times the scales
of a block's channels is rounded to 8 bits; for values, the weights times the scales of 32 channels are. The products
with the minima stay exact. (KIVI, arXiv:2402.02750, dequantises instead; rounding here adds a few percent to the error
that the format itself makes.)
Shapes: R sequences, Hq query heads, H KV heads, n slots of one lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvatlas.core.layout import GROUP
from kvatlas.kernels.lane import key_codes, lane_keys, lane_positions, lane_values, value_codes
from kvatlas.kernels.pool import BlockPool, Part

_MOST = 127
"""Queries and weights are rounded to integers up to this."""


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
    (R, Hq, _), H = q.shape, parts[0].table.shape[1]
    out = torch.zeros(R, Hq, parts[0].pool.layout.value_dim, dtype=torch.float64, device=q.device)
    sizes = [p.table.shape[-1] * p.pool.layout.block_size if slots is None else slots.shape[-1] for p in parts]
    mass = [torch.zeros(R, H, size, dtype=torch.float64, device=q.device) for size in sizes]
    for r in range(R):
        for head in range(Hq):
            h = head // (Hq // H)
            oldest = None if window is None or query_position is None else int(query_position[r]) - window + 1
            read = [_slots(part, r, h, slots, oldest) for part in parts]
            query = q[r, head].double() * scale
            score = torch.cat([_scores(p.pool, p.table[r, h], n, query) for p, (_, n) in zip(parts, read, strict=True)])
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sinks is not None:
                score = torch.cat([score, sinks[head].double().reshape(1)])
            counts = [len(numbers) for _, numbers in read]
            weights = torch.split(torch.softmax(score, dim=0)[: sum(counts)], counts)
            for i, (part, (index, numbers)) in enumerate(zip(parts, read, strict=True)):
                out[r, head] += _weigh(part.pool, part.table[r, h], numbers, weights[i])
                mass[i][r, h, index] += weights[i]
    return out.to(q.dtype), [each.float() for each in mass] if need_mass else None


def _slots(part: Part, r: int, h: int, slots: Tensor | None, oldest: int | None) -> tuple[Tensor, Tensor]:
    """Return the visible slots of one lane: where their mass goes [n], and their numbers [n]."""
    index = torch.arange(int(part.length[r, h]), device=part.table.device)
    numbers = index if slots is None else slots[r, h, index].long()
    seen = torch.ones_like(index, dtype=torch.bool)
    if oldest is not None or (part.hide_empty and part.dense_start is None):
        position = lane_positions(part, part.table[r, h], numbers)
        seen = (position >= 0) | (not part.hide_empty)
        seen &= position >= (position if oldest is None else oldest)
    return index[seen], numbers[seen]


def _scores(pool: BlockPool, table: Tensor, slots: Tensor, query: Tensor) -> Tensor:
    """Return the dot products [n] of a query [Dk] with the keys of some slots of a lane."""
    if not pool.layout.format.is_packed:
        return lane_keys(pool, table, slots) @ query
    scores = torch.zeros(len(slots), dtype=torch.float64, device=query.device)
    for block, here, offsets in _by_block(pool, table, slots):
        scale, minimum = pool.key_params[block].double()
        rounded, unit = _rounded(query * scale)
        scores[here] = key_codes(pool, block)[offsets].double() @ rounded * unit + minimum @ query
    return scores


def _weigh(pool: BlockPool, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum [Dv] of the values of some slots of a lane."""
    if not pool.layout.format.is_packed:
        return weights @ lane_values(pool, table, slots)
    out = torch.zeros(pool.layout.value_dim, dtype=torch.float64, device=weights.device)
    for block, here, offsets in _by_block(pool, table, slots):
        codes = value_codes(pool, block)[offsets].double()
        for group, (scale, minimum) in enumerate(pool.value_params[block].double().transpose(0, 1)):
            channels = slice(group * GROUP, (group + 1) * GROUP)
            rounded, unit = _rounded(weights[here] * scale[offsets])
            out[channels] += rounded @ codes[:, channels] * unit + weights[here] @ minimum[offsets]
    return out


def _rounded(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers of at most 127 in size, and the unit that they count, for the numbers nearest to them."""
    largest = numbers.abs().max()
    if largest == 0:
        return numbers, largest
    return torch.round(numbers * _MOST / largest), largest / _MOST


def _by_block(pool: BlockPool, table: Tensor, slots: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each block: its id, which of the slots [n] lie in it, and where in it these lie."""
    column, offset = slots // pool.layout.block_size, slots % pool.layout.block_size
    for each in torch.unique(column).tolist():
        here = column == each
        yield int(table[each]), here, offset[here]
