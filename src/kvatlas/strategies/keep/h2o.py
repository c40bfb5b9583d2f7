"""H2O: keep the newest tokens and the heavy hitters, those that received most attention (arXiv:2306.14048).

Differs from the paper: the query heads of a GQA group share one KV head, so their attention is summed. As in the
official code, the prompt is processed in full and cut once at its end; from then on each step evicts one token.
The sums over the prompt are exact, attention between chunks included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvatlas.core.vocabulary import Moment, Need, Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Keep, StageInfo, check_share, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LayerView


@register(
    "h2o",
    StageInfo(
        summary="heavy hitters by accumulated attention, and a recent window",
        paper="arXiv:2306.14048",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        needs=frozenset({Need.COLUMN_SUMS}),
        moments=frozenset({Moment.AFTER_PREFILL, Moment.AFTER_STEP}),
    ),
)
@dataclass(frozen=True, kw_only=True)
class H2O(Keep):
    """Keep ``heavy`` + ``recent`` tokens per KV head.

    Args:
        heavy: tokens with the highest accumulated attention; an integer counts tokens, a fraction in (0, 1] is of
            the prompt.
        recent: newest tokens, likewise.

    Raises:
        ConfigError: a count is not positive or a fraction is outside (0, 1].
    """

    heavy: int | float = 0.1
    recent: int | float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("h2o", "heavy", self.heavy)
        check_share("h2o", "recent", self.recent)

    def capacity(self, prompt_tokens: int) -> int | None:
        """Return heavy + recent and one slot for the token that joins before one is evicted."""
        return tokens_of(self.heavy, prompt_tokens) + self.recent_tokens(prompt_tokens) + 1

    def recent_tokens(self, prompt_tokens: int) -> int:
        """Return ``recent`` in tokens."""
        return tokens_of(self.recent, prompt_tokens)

    def scores(self, view: LayerView) -> Tensor:
        """Return the accumulated attention, and infinity for the recent window."""
        assert view.column_sums_BHS is not None
        newest = view.positions_BHS >= (view.seen_B - view.recent_B)[:, None, None]
        return view.column_sums_BHS.masked_fill(newest, float("inf"))
