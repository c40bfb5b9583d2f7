"""TOVA: keep what the newest token attends to, the same tokens for all heads of a layer (arXiv:2401.06104).

After each step the token goes that received least attention from the query just asked, on average over the layer's
heads; the prompt is cut once, by the attention of its last token. Nothing is protected, not even the newest token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.needs import Received
from kvatlas.core.plan import Traits
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Budget, Keep, Limits, Stage, StageInfo, check_share, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LaneView


@register(
    "tova",
    StageInfo(
        summary="tokens that the newest query attends to, chosen for all heads of a layer together",
        paper="arXiv:2401.06104",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=Traits(prompt_shareable=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Tova(Keep):
    """Keep ``budget`` tokens, at every step.

    Args:
        budget: tokens kept; an integer counts tokens, a fraction in (0, 1] is of the prompt.

    Raises:
        ConfigError: ``budget`` is not positive, or a fraction above 1.
    """

    sizes: ClassVar[frozenset[str]] = frozenset({"budget"})

    budget: int | float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("tova", "budget", self.budget)

    def conflict(self, other: Stage) -> str | None:
        """Refuse what lets heads of a layer hold different tokens."""
        if isinstance(other, Budget) and other.ragged:
            return "it keeps the same tokens in all heads of a layer, so there is nothing to divide; leave one out"
        return None

    def limits(self, prompt_tokens: int) -> Limits:
        """Return the budget in tokens."""
        return Limits.steady(tokens_of(self.budget, prompt_tokens))

    @property
    def needs(self) -> tuple[Received]:
        """Return the attention that the newest query pays."""
        return (Received(queries=1),)

    def scores(self, view: LaneView) -> Tensor:
        """Return the attention received, summed over the heads of a layer; their slots hold the same tokens."""
        summed = view.by_layer(view.received).sum(dim=2, keepdim=True)
        return summed.expand(-1, -1, view.heads, -1).flatten(1, 2)
