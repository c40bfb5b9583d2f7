"""What a stage sees of the cache. Built by storage, read by strategies, changed by nobody.

Shapes: B sequences of one strategy, H lanes (the KV heads of one layer, or of all layers where a moment spans
them), S slots padded to the longest lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """Cached tokens of B sequences.

    Args:
        positions_BHS: int32, position of the token in each slot; meaningless where not valid.
        valid_BHS: bool, whether the slot holds a token that a later query may see.
        seen_B: int64, tokens that each sequence has processed; the newest has position ``seen - 1``.
        recent_B: int64, newest tokens that the strategy protects, as ``Keep.recent_tokens`` answered.
        column_sums_BHS: float32, attention received so far, summed over all queries and the query heads of the
            GQA group; present where the strategy declares ``Need.COLUMN_SUMS``.
    """

    positions_BHS: Tensor
    valid_BHS: Tensor
    seen_B: Tensor
    recent_B: Tensor
    column_sums_BHS: Tensor | None = None
