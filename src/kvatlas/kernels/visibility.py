"""Which slots a query may see, decided on positions.

Slots of a lane are not in position order, so causality, sliding windows and A-shaped patterns all compare
positions. Decode, chunk attention and column sums share these rules, so that they cannot disagree.
Shapes: R sequences, H KV heads, C table columns, T queries, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvatlas.core.errors import ConfigError
from kvatlas.kernels.gather import gather_slots
from kvatlas.kernels.pool import Part

NO_TOKEN = torch.iinfo(torch.int32).max
"""The position given to slots without a token: later than any query, so causality hides them."""


def slot_mask(
    part: Part,
    *,
    window: int | None = None,
    query_position: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor | None:
    """Return what to add to decode scores, 0 or -inf, float32 [R, H, S]; None if all is visible.

    S is C * block_size, or S' with ``slots``. On devices other than the CPU a mask always comes back, because looking
    would wait for the device.

    Args:
        part: the lanes.
        window: a query at position p sees positions > p - window; needs ``query_position``.
        query_position: [R] position of each sequence's query.
        slots: [R, H, S'] slots to read instead of those at the front; ``part.length`` then counts these.

    Raises:
        ConfigError: a window without the positions that it compares.
    """
    check_window(part, window, query_position)
    size, length = part.pool.layout.block_size, part.length
    count = part.table.shape[-1] * size if slots is None else slots.shape[-1]
    hides = part.hide_empty and part.dense_start is None
    if not hides and window is None and length.device.type == "cpu" and bool((length >= count).all()):
        return None
    visible_RHS = torch.arange(count, device=length.device) < length.unsqueeze(-1)
    if hides or window is not None:
        position_RHS = _positions(part, count, slots)
        if hides:
            visible_RHS &= position_RHS >= 0
        if window is not None and query_position is not None:
            visible_RHS &= position_RHS > (query_position - window).view(-1, 1, 1)
    return additive(visible_RHS)


def check_window(part: Part, window: int | None, query_position: Tensor | None) -> None:
    """Raise if a part, or the caller, lacks the positions that a window compares.

    Raises:
        ConfigError: naming what is missing.
    """
    if window is None:
        return
    if query_position is None:
        raise ConfigError(f"window={window} compares positions; pass query_position as well")
    if part.dense_start is None and not part.pool.layout.positions:
        raise ConfigError(f"window={window} compares positions; give the part a dense_start, or its layout positions")


def _positions(part: Part, count: int, slots: Tensor | None) -> Tensor:
    """Return the position of each slot [R, H, S], or [S] if all lanes agree."""
    if part.dense_start is not None:
        return part.dense_start + (torch.arange(count, device=part.table.device) if slots is None else slots)
    position_RHS = gather_slots(part.pool.positions, part.table)
    return position_RHS if slots is None else position_RHS.gather(-1, slots.long())


def additive(visible: Tensor) -> Tensor:
    """Return 0 where ``visible`` and -inf elsewhere, float32 in the shape of ``visible``."""
    shown = torch.zeros((), dtype=torch.float32, device=visible.device)
    return torch.where(visible, shown, shown - torch.inf)


@dataclass(frozen=True)
class Sight:
    """The rule of one chunk: a key is visible if it is not later than the query and every limit admits it.

    Args:
        window: visible are positions > query - window; None for no limit.
        reach: (sink_tokens, recent): visible are positions < sink_tokens or > query - recent; None: no limit.
    """

    window: int | None = None
    reach: tuple[int, int] | None = None

    def mask(self, query_T: Tensor, key_HS: Tensor) -> Tensor:
        """Return whether each query sees each key, bool [H, T, S].

        Args:
            query_T: [T] positions.
            key_HS: [H or 1, S] positions, :data:`NO_TOKEN` for slots without a token.
        """
        query, key = query_T.view(1, -1, 1), key_HS.unsqueeze(1)
        visible = key <= query
        if self.window is not None:
            visible &= key > query - self.window
        if self.reach is not None:
            sink_tokens, recent = self.reach
            visible &= (key > query - recent) | (key < sink_tokens)
        return visible

    def relation(self, query: tuple[int, int], key: tuple[int, int]) -> Literal["all", "some", "none"]:
        """Return how much is visible between two ranges of positions: "some" means that a mask must tell.

        Args:
            query: (lowest, highest) position of the queries.
            key: (lowest, highest) position of the keys; the highest is :data:`NO_TOKEN` if a slot has none.
        """
        (q_low, q_high), (k_low, k_high) = query, key
        full = k_high <= q_low
        empty = k_low > q_high
        if self.window is not None:
            full &= k_low > q_high - self.window
            empty |= k_high <= q_low - self.window
        if self.reach is not None:
            sink_tokens, recent = self.reach
            full &= k_low > q_high - recent or k_high < sink_tokens or sink_tokens > q_high - recent
            empty |= k_low >= sink_tokens and k_high <= q_low - recent
        return "none" if empty else "all" if full else "some"

    def spans(self, query: tuple[int, int], first: int, end: int) -> list[tuple[int, int]]:
        """Return the position ranges [low, high) within [first, end) that some query may see, in order.

        Args:
            query: (lowest, highest) position of the queries.
            first: lowest position there is.
            end: one past the highest position there is.
        """
        q_low, q_high = query
        low = first if self.window is None else max(first, q_low - self.window + 1)
        high = min(end, q_high + 1)
        spans = [(low, high)]
        if self.reach is not None:
            sink_tokens, recent = self.reach
            near = q_low - recent + 1
            if near > sink_tokens:
                spans = [(low, min(high, sink_tokens)), (max(low, near), high)]
        return [(a, b) for a, b in spans if a < b]
