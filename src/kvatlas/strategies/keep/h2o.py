"""H2O: keep the newest tokens and the heavy hitters, those that received most attention (arXiv:2306.14048).

Differs from the paper: the query heads of a GQA group share one KV head, so their attention is summed. As in the
official code, the prompt is processed in full and cut once at its end; from then on each step evicts one token.
The sums over the prompt are exact, attention between chunks included.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.needs import Received
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Keep, Limits, StageInfo, check_share, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LaneView


_HALF = 0.1


def _halves(budget: int | float) -> tuple[int | float, int | float]:
    """Return a budget in two parts, the first at least as large.

    Raises:
        ConfigError: it is no number, or too small for two parts.
    """
    if type(budget) is float:
        check_share("h2o", "budget", budget)
        return (round(budget / 2, 6),) * 2
    if type(budget) is not int or budget < 2:
        raise ConfigError(
            f"h2o: budget={budget!r} is out of range; write a fraction of the prompt or at least 2 tokens"
        )
    return budget - budget // 2, budget // 2


@register(
    "h2o",
    StageInfo(
        summary="heavy hitters by accumulated attention, and a recent window",
        paper="arXiv:2306.14048",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
    ),
)
@dataclass(frozen=True, kw_only=True)
class H2O(Keep):
    """Keep ``heavy`` + ``recent`` tokens per KV head.

    Args:
        heavy: tokens with the highest accumulated attention; an integer counts tokens, a fraction in (0, 1] is of
            the prompt.
        recent: newest tokens, likewise.
        budget: both together, evenly split; written in their place.

    Raises:
        ConfigError: a count is not positive or a fraction is outside (0, 1], or a budget is given beside a part of it.
    """

    sizes: ClassVar[frozenset[str]] = frozenset({"heavy", "recent"})
    also: ClassVar[frozenset[str]] = frozenset({"budget"})

    heavy: int | float = _HALF
    recent: int | float = _HALF
    budget: InitVar[int | float | None] = None

    def __post_init__(self, budget: int | float | None) -> None:
        if budget is not None:
            if (self.heavy, self.recent) != (_HALF, _HALF):
                raise ConfigError("h2o: budget is heavy and recent together; give the one or the others")
            heavy, recent = _halves(budget)
            object.__setattr__(self, "heavy", heavy)
            object.__setattr__(self, "recent", recent)
        super().__post_init__()
        check_share("h2o", "heavy", self.heavy)
        check_share("h2o", "recent", self.recent)

    def sized(self, fraction: float) -> H2O:
        """Return it with the fraction evenly split."""
        heavy, recent = _halves(fraction)
        return replace(self, heavy=heavy, recent=recent)

    def limits(self, prompt_tokens: int) -> Limits:
        """Return heavy + recent, beside one slot for the token that joins before one is evicted."""
        return Limits.steady(tokens_of(self.heavy, prompt_tokens) + self.recent_tokens(prompt_tokens))

    @property
    def needs(self) -> tuple[Received]:
        """Return all attention ever received."""
        return (Received(),)

    def recent_tokens(self, prompt_tokens: int) -> int:
        """Return ``recent`` in tokens."""
        return tokens_of(self.recent, prompt_tokens)

    def scores(self, view: LaneView) -> Tensor:
        """Return the accumulated attention, and infinity for the recent window."""
        return view.received.masked_fill(view.newest, float("inf"))
