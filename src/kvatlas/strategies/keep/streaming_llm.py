"""StreamingLLM: keep the first tokens and the newest ones (arXiv:2309.17453).

Differs from the paper: tokens keep the positions they had in the text, as in kvpress; the paper assigns positions
inside the cache, which matters only beyond the length that a model was trained for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import Traits
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Budget, Keep, Limits, Reach, Stage, StageInfo, check_share, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LaneView


_RECENT = 512


@register(
    "streaming_llm",
    StageInfo(
        summary="attention sinks and a recent window",
        paper="arXiv:2309.17453",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=Traits(query_agnostic=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Keep):
    """Let each token see ``sinks`` first tokens and ``recent`` newest ones, itself included; forget the rest.

    Args:
        sinks: first tokens of the sequence, never evicted; tokens.
        recent: newest tokens; an integer counts tokens, a fraction in (0, 1] is of the prompt; 512 unless ``budget`` is
            given.
        budget: both together, likewise.

    Raises:
        ConfigError: ``sinks`` is negative, ``recent`` or ``budget`` is out of range, or both are given.
    """

    streams: ClassVar[bool] = True
    sizes: ClassVar[frozenset[str]] = frozenset({"recent", "budget"})

    sinks: int = 4
    recent: int | float | None = None
    budget: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ConfigError(f"streaming_llm: sinks={self.sinks} is out of range; write at least 0 tokens")
        if self.budget is None:
            object.__setattr__(self, "recent", _RECENT if self.recent is None else self.recent)
            check_share("streaming_llm", "recent", self.recent or 0)
            return
        if self.recent is not None:
            raise ConfigError("streaming_llm: budget is sinks and recent together; give 'budget' or 'recent'")
        check_share("streaming_llm", "budget", self.budget)
        if isinstance(self.budget, int) and self.budget <= self.sinks:
            raise ConfigError(f"streaming_llm: budget={self.budget} must exceed sinks={self.sinks}; raise it")

    def conflict(self, other: Stage) -> str | None:
        """Refuse what gives layers or heads different shares."""
        if isinstance(other, Budget):
            return "what a prompt query may see would differ from what is kept; leave one out"
        return None

    def sized(self, fraction: float) -> StreamingLLM:
        """Return it with that many recent tokens beside the paper's four sinks."""
        return replace(self, sinks=4, recent=fraction, budget=None)

    def limits(self, prompt_tokens: int) -> Limits:
        """Return sinks + recent, the token that joins included."""
        return Limits.steady(self.sinks + self._recent(prompt_tokens) - 1)

    def _recent(self, prompt_tokens: int) -> int:
        if self.budget is not None:
            return max(1, tokens_of(self.budget, prompt_tokens) - self.sinks)
        assert self.recent is not None
        return tokens_of(self.recent, prompt_tokens)

    def reach(self, prompt_tokens: int) -> Reach | None:
        """Return the same limit for prompt tokens, so that a prompt in chunks equals the prompt as a whole."""
        return Reach(sinks=self.sinks, recent=self._recent(prompt_tokens))

    def scores(self, view: LaneView) -> Tensor:
        """Return the position as score: the oldest goes first, sinks never."""
        return view.positions_BHS.float().masked_fill(view.positions_BHS < self.sinks, float("inf"))
