"""SnapKV: keep the prompt tokens that the end of the prompt looked at (arXiv:2404.14469).

Differs from the paper: votes are summed over a GQA group, whose query heads share one KV head. As in the paper, the
prompt is cut once and tokens of the output stay; so the cache grows by the output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.needs import Received
from kvatlas.core.plan import Traits
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Keep, Limits, StageInfo, check_share, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LaneView


_SMALL_WINDOW = 16


@register(
    "snapkv",
    StageInfo(
        summary="prompt tokens that the last prompt tokens attended to, pooled",
        paper="arXiv:2404.14469",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=Traits(prompt_shareable=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class SnapKV(Keep):
    """Score each prompt token by the attention it receives from the observation window.

    Args:
        budget: prompt tokens kept per KV head, the window included; an integer counts tokens, a fraction in (0, 1]
            is of the prompt.
        window: observation window, in tokens, counted back from the last prompt token; never evicted.
        pool: positions that vote together, so that neighbours survive together, in tokens; odd.
        pooling: how they do: their ``mean``, or their ``max`` as in RocketKV.

    Raises:
        ConfigError: a width is out of range, ``pool`` is even, ``pooling`` is unknown, or a budget in tokens does not
            exceed the window.
    """

    sizes: ClassVar[frozenset[str]] = frozenset({"budget"})

    budget: int | float = 1024
    window: int = 32
    pool: int = 5
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("snapkv", "budget", self.budget)
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise ConfigError(f"snapkv wants window >= 1 and an odd pool >= 1, got {self.window} and {self.pool}")
        if self.pooling not in ("mean", "max"):
            raise ConfigError(f"snapkv: pooling={self.pooling} is unknown; write mean or max")
        if isinstance(self.budget, int) and self.budget <= self.window:
            raise ConfigError(f"snapkv: budget={self.budget} must exceed window={self.window}; raise it")

    def sized(self, fraction: float) -> SnapKV:
        """Return it with another budget, and a window that small fractions of short prompts can hold."""
        return replace(self, budget=fraction, window=min(self.window, _SMALL_WINDOW))

    def limits(self, prompt_tokens: int) -> Limits:
        """Return the budget in tokens, at least the window and one more; tokens of the output stay."""
        return Limits(after_prompt=max(tokens_of(self.budget, prompt_tokens), self.window + 1))

    @property
    def needs(self) -> tuple[Received]:
        """Return the attention that the observation window paid."""
        return (Received(queries=self.window, in_decode=False),)

    def recent_tokens(self, prompt_tokens: int) -> int:
        """Return the observation window, which is kept."""
        return self.window

    def scores(self, view: LaneView) -> Tensor:
        """Return the pooled votes, and infinity for the window; slots come in position order."""
        from torch.nn.functional import avg_pool1d, max_pool1d  # strategies load without torch

        votes_BHS = view.received.masked_fill(view.newest | ~view.valid_BHS, 0.0)
        pool = avg_pool1d if self.pooling == "mean" else max_pool1d
        pooled_BHS: Tensor = pool(votes_BHS, self.pool, stride=1, padding=self.pool // 2)
        return pooled_BHS.masked_fill(view.newest, float("inf"))
