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
from kvatlas.strategies.stage import Keep, Reach, StageInfo, check_share, tokens_of

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
        recent: newest tokens; an integer counts tokens, a fraction in (0, 1] is of the prompt.

    Raises:
        ConfigError: ``sinks`` is negative or ``recent`` is out of range.
    """

    sinks: int = 4
    recent: int | float = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ConfigError(f"streaming_llm: sinks={self.sinks} is out of range; write at least 0 tokens")
        check_share("streaming_llm", "recent", self.recent)

    def capacity(self, prompt_tokens: int) -> int | None:
        """Return sinks + recent."""
        return self.sinks + tokens_of(self.recent, prompt_tokens)

    def reach(self, prompt_tokens: int) -> Reach | None:
        """Return the same limit for prompt tokens, so that a prompt in chunks equals the prompt as a whole."""
        return Reach(sinks=self.sinks, recent=tokens_of(self.recent, prompt_tokens))

    def scores(self, view: LayerView) -> Tensor:
        """Return the position as score: the oldest goes first, sinks never."""
        return view.positions_BHS.float().masked_fill(view.positions_BHS < self.sinks, float("inf"))
