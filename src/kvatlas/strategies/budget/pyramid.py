"""PyramidKV: lower layers keep more, upper layers less, as many in all (arXiv:2406.02069).

Attention of lower layers is spread over the context, that of upper layers gathers on few tokens. Budgets fall from
layer to layer by equal steps in whole tokens, rounded down as in the official code: so L layers together may keep up to
L * (L - 2) / 2 tokens more than evenly divided, which is much where budgets are small and models deep. What is kept is
the *keep* stage's choice; its newest tokens stay in every layer.

Differs from the official code: every layer keeps at least one token beside the newest; layers with a sliding window,
whose limit is their own, are left out of the ramp.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import INEXACT
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Budget, StageInfo


@register(
    "pyramid",
    StageInfo(
        summary="give lower layers more of the budget than upper ones, by equal steps",
        paper="arXiv:2406.02069",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=INEXACT,
    ),
)
@dataclass(frozen=True, kw_only=True)
class Pyramid(Budget):
    """Let layers differ in what they keep.

    Args:
        beta: the last layer keeps the ``beta``-th part of an even division, in tokens beside the newest; at least 1,
            which divides evenly.

    Raises:
        ConfigError: ``beta`` is below 1.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ConfigError(
                f"pyramid: beta={self.beta} is out of range; write a whole number of at least 1, such as 20"
            )

    def of_layer(self, kept: int, recent: int, prompt_tokens: int, layer: int, num_layers: int) -> int:
        """Return the layer's step of the ramp; no layer is given more than the prompt has."""
        even, there = kept - recent, prompt_tokens - recent
        if num_layers == 1 or even >= there:
            return kept
        least = max(1, even // self.beta)
        most = 2 * even - least
        if most > there:
            most = there
            least = 2 * even - most
        return recent + most - layer * ((most - least) // (num_layers - 1))
