"""Knorm: keep the keys with the smallest norm, which attract most attention (arXiv:2406.11430).

No query is asked, so what is kept suits any question, and costs no second look at attention.

Differs from the paper: the first and the newest tokens stay whatever their norm, without which eviction fails on most
models; every layer is cut (``layers=2-`` leaves out the first two, as the paper does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import Traits
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Keep, Limits, StageInfo, check_share, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LaneView


@register(
    "knorm",
    StageInfo(
        summary="prompt tokens whose keys have the smallest norm",
        paper="arXiv:2406.11430",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=Traits(prompt_shareable=True, query_agnostic=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Knorm(Keep):
    """Cut a prompt once, by the norms of its keys; tokens of the output stay.

    Args:
        budget: prompt tokens kept per KV head; an integer counts tokens, a fraction in (0, 1] is of the prompt.
        sinks: first tokens, never evicted; tokens.
        recent: newest tokens of the prompt, never evicted; tokens.

    Raises:
        ConfigError: a number is out of range, or a budget in tokens does not exceed ``sinks + recent``.
    """

    sizes: ClassVar[frozenset[str]] = frozenset({"budget"})

    budget: int | float = 1024
    sinks: int = 4
    recent: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("knorm", "budget", self.budget)
        if self.sinks < 0 or self.recent < 0:
            raise ConfigError(f"knorm wants sinks and recent of at least 0 tokens, got {self.sinks} and {self.recent}")
        if isinstance(self.budget, int) and self.budget <= self.sinks + self.recent:
            raise ConfigError(f"knorm: budget={self.budget} must exceed sinks + recent; raise it")

    def limits(self, prompt_tokens: int) -> Limits:
        """Return the budget in tokens, at least one more than stay for certain."""
        return Limits(after_prompt=max(tokens_of(self.budget, prompt_tokens), self.sinks + self.recent + 1))

    def recent_tokens(self, prompt_tokens: int) -> int:
        """As asked for."""
        return self.recent

    def scores(self, view: LaneView) -> Tensor:
        """Return the negative norms, and infinity for what stays for certain."""
        certain = view.newest | (view.positions_BHS < self.sinks)
        norms: Tensor = -view.keys().norm(dim=-1)
        return norms.masked_fill(certain, float("inf"))
