"""Streaming over keys: tiles of past slots, tiles of the chunk itself, and the scores of one tile.

Chunk attention and column sums walk the same tiles in the same order with the same visibility, and hold one
tile at a time: memory does not grow with the past.
Shapes: T queries, H KV heads, G query heads per KV head, C table columns, S slots of a tile, D key width,
E value width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvatlas.kernels.gather import gather_slots, read_entries
from kvatlas.kernels.pool import Part
from kvatlas.kernels.visibility import NO_TOKEN, Sight, additive

STEP_BYTES = 4 << 20
"""Most bytes of one float32 temporary of a step; a step holds two or three of them."""

LOG2_E = math.log2(math.e)
"""Scores are in units of log 2: on the CPU torch's exp2 is 3 times faster than its exp, 15 times at -inf."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Some queries and some keys that attend at once.

    Args:
        heads: which KV heads.
        rows: which queries.
        first: index of the first key, as a slot of the part or as a token of the chunk.
        k: [H, S, D] in the type of the queries.
        v: [H, S, E] in the type of the queries, or None where values are not needed.
        mask: additive float32 [H or 1, T, S], or None if every query sees every key.
    """

    heads: slice
    rows: slice
    first: int
    k: Tensor
    v: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Queries:
    """The positions of a chunk's queries, on the device for masks and on the host for decisions.

    Args:
        positions: [T] on the device of the queries.
        host: the same on the CPU.
    """

    positions: Tensor
    host: Tensor

    @classmethod
    def at(cls, positions: Tensor) -> Queries:
        """Return the queries at ``positions`` [T]; waits for the device once."""
        return cls(positions, positions.cpu())

    @cached_property
    def range(self) -> tuple[int, int]:
        """(lowest, highest) position."""
        return _range(self.host)

    def rows(self, rows: slice) -> Queries:
        """Return the queries of ``rows`` alone."""
        return Queries(self.positions[rows], self.host[rows])

    def are_causal(self, sight: Sight) -> bool:
        """Whether query i sees exactly the chunk's keys 0 to i: positions ascend and no limit cuts."""
        ascending = bool((self.host[1:] > self.host[:-1]).all())
        low, high = self.range
        return ascending and sight.relation((high, high), (low, high)) == "all"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Walks the keys that a chunk's queries may see, holding one tile at a time.

    Args:
        queries: the chunk's queries.
        sight: the visibility rule.
        tile_slots: keys of a tile; past tiles are rounded up to whole blocks.
        dtype: type of the keys and values to yield.
        numbers_per_pair: float32 numbers that the caller holds for a query and a key, per KV head. They limit
            the queries of a step; with 0, a step that needs no mask has all of them.
    """

    queries: Queries
    sight: Sight
    tile_slots: int
    dtype: torch.dtype
    numbers_per_pair: int

    def past(self, part: Part, *, values: bool) -> Iterator[Step]:
        """Yield the steps over cached slots that some query sees, reading no others; waits for the device once.

        Args:
            part: lanes, table [H, C]. With a ``dense_start`` all its lengths are equal.
            values: whether to read values as well as keys.
        """
        size = part.pool.layout.block_size
        tile = -(-self.tile_slots // size) * size
        for heads, count in _equal_lanes(part.length):
            for low, high in self._slot_spans(count, part.dense_start):
                for begin in range(low // size * size, high, tile):
                    first, end = max(low, begin), min(high, begin + tile)
                    columns = part.table[heads, first // size : -(-end // size)]
                    inside = slice(first % size, first % size + end - first)
                    if part.dense_start is None:
                        keys = _stored_positions(part.pool.positions, columns, inside)
                    else:
                        keys = _dense_positions(part.dense_start + first, part.dense_start + end, columns.device)
                    if self.sight.relation(self.queries.range, keys.range) == "none":
                        continue
                    k = read_entries(part.pool, "keys", columns, self.dtype)[:, inside]
                    v = read_entries(part.pool, "values", columns, self.dtype)[:, inside] if values else None
                    if keys.range[1] == NO_TOKEN:
                        _clear(keys.positions == NO_TOKEN, k, v)
                    yield from self._steps(heads, first, k, v, keys)

    def own(self, k: Tensor, v: Tensor | None) -> Iterator[Step]:
        """Yield the steps over the chunk's own keys.

        Args:
            k: [T, H, D].
            v: [T, H, E], or None where values are not needed.
        """
        for first in range(0, k.shape[0], self.tile_slots):
            rows = slice(first, first + self.tile_slots)
            part = self.queries.rows(rows)
            yield from self._steps(
                slice(0, k.shape[1]),
                first,
                k[rows].transpose(0, 1).to(self.dtype),
                None if v is None else v[rows].transpose(0, 1).to(self.dtype),
                _Keys(part.positions.unsqueeze(0), part.range),
            )

    def _steps(self, heads: slice, first: int, k: Tensor, v: Tensor | None, keys: _Keys) -> Iterator[Step]:
        total = self.queries.host.shape[0]
        numbers = max(k.shape[0] * self.numbers_per_pair, keys.positions.shape[0]) * k.shape[1]
        count = max(1, STEP_BYTES // (4 * numbers))
        if self.numbers_per_pair == 0 and self.sight.relation(self.queries.range, keys.range) == "all":
            count = total
        for begin in range(0, total, count):
            rows = slice(begin, begin + count)
            part = self.queries.rows(rows)
            relation = self.sight.relation(part.range, keys.range)
            if relation == "none":
                continue
            some = relation == "some"
            mask = additive(self.sight.mask(part.positions, keys.positions)) if some else None
            yield Step(heads=heads, rows=rows, first=first, k=k, v=v, mask=mask)

    def _slot_spans(self, count: int, dense_start: int | None) -> list[tuple[int, int]]:
        if dense_start is None:
            return [(0, count)]
        spans = self.sight.spans(self.queries.range, dense_start, dense_start + count)
        return [(low - dense_start, high - dense_start) for low, high in spans]


@dataclass(frozen=True)
class _Keys:
    """Positions [H or 1, S], NO_TOKEN where a slot has none, and the (lowest, highest) of them."""

    positions: Tensor
    range: tuple[int, int]


def log2_scores(q_HGTD: Tensor, k_HSD: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None) -> Tensor:
    """Return the scores in units of log 2, new memory [H, G, T, S]; hidden pairs are -inf.

    Args:
        q_HGTD: queries, float32 or float64.
        k_HSD: keys in the same type.
        mask: additive [H or 1, T, S], or None.
        scale: factor of the dot product.
        softcap: cap of ``cap * tanh(score / cap)``, or None.
    """
    H, G, T, D = q_HGTD.shape
    # The queries are the smallest operand, so the factors go there: the scores are written once.
    factor = scale * LOG2_E if softcap is None else 2 * scale / softcap
    scaled = (q_HGTD * factor).reshape(H, G * T, D)
    scores = torch.bmm(scaled, k_HSD.transpose(1, 2)).view(H, G, T, -1)
    if softcap is not None:
        # tanh(x) = 2 * sigmoid(2 * x) - 1, and torch's sigmoid is 6 times faster on the CPU than its tanh.
        cap = softcap * LOG2_E
        scores.sigmoid_().mul_(2 * cap).sub_(cap)
    if mask is not None:
        scores += mask.unsqueeze(1)
    return scores


def _equal_lanes(length: Tensor) -> list[tuple[slice, int]]:
    """Return the heads to attend together, each with its length.

    Lanes of one length need no mask for it. Lanes of several lengths go one by one, which costs less than
    masking all of them up to the longest.
    """
    lengths = [int(n) for n in length.tolist()]
    if len(set(lengths)) == 1:
        return [(slice(0, len(lengths)), lengths[0])]
    return [(slice(h, h + 1), n) for h, n in enumerate(lengths)]


def _dense_positions(low: int, high: int, device: torch.device) -> _Keys:
    return _Keys(torch.arange(low, high, device=device).unsqueeze(0), (low, high - 1))


def _stored_positions(pos_pool: Tensor, columns: Tensor, inside: slice) -> _Keys:
    stored = gather_slots(pos_pool, columns)[:, inside]
    positions = torch.where(stored < 0, NO_TOKEN, stored)
    # Elsewhere than on the CPU, looking would wait for the device: the widest range means "use the mask".
    return _Keys(positions, _range(positions) if positions.device.type == "cpu" else (0, NO_TOKEN))


def _clear(empty_HS: Tensor, *entries: Tensor | None) -> None:
    """Write zeros over slots without a token: they may hold NaN, which no mask and no weight of 0 hides."""
    for tensor in entries:
        if tensor is not None:
            tensor.masked_fill_(empty_HS.unsqueeze(-1), 0)


def _range(positions: Tensor) -> tuple[int, int]:
    low, high = torch.aminmax(positions)
    return int(low), int(high)
