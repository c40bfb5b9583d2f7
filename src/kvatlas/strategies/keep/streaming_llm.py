"""StreamingLLM: keep the first tokens and the newest ones (arXiv:2309.17453).

Differs from the paper: tokens keep the positions they had in the text, as in kvpress; the paper assigns positions
inside the cache, which matters only beyond the length that a model was trained for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvatlas.core.errors import ConfigError
from kvatlas.core.vocabulary import Moment, Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Keep, Reach, StageInfo

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LayerView


@register(
    "streaming_llm",
    StageInfo(
        summary="attention sinks and a recent window",
        paper="arXiv:2309.17453",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        moments=frozenset({Moment.AFTER_CHUNK, Moment.AFTER_PREFILL, Moment.AFTER_STEP}),
    ),
)
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Keep):
    """Let each token see ``sinks`` first tokens and ``recent`` newest ones, itself included; forget the rest.

    Args:
        sinks: first tokens of the sequence, never evicted; tokens.
        recent: newest tokens, tokens.

    Raises:
        ConfigError: ``sinks`` is negative or ``recent`` is not positive.
    """

    sinks: int = 4
    recent: int = 512

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise ConfigError(f"streaming_llm wants sinks >= 0 and recent >= 1, got {self.sinks} and {self.recent}")

    def capacity(self, prompt_tokens: int) -> int | None:
        """Return sinks + recent, whatever the prompt."""
        return self.sinks + self.recent

    @property
    def reach(self) -> Reach | None:
        """The same limit for prompt tokens, so that a prompt in chunks equals the prompt as a whole."""
        return Reach(sinks=self.sinks, recent=self.recent)

    def scores(self, view: LayerView) -> Tensor:
        """Return the position as score: the oldest goes first, sinks never."""
        return view.positions_BHS.float().masked_fill(view.positions_BHS < self.sinks, float("inf"))
