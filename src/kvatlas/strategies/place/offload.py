"""Offloading: keys and values live on the host and visit the device layer by layer (FlexGen, arXiv:2303.06865).

Differs from FlexGen: batches are continuous rather than zig-zag blocks, attention runs on the device, and weights stay
where they are. A layer is fetched while the one before it computes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import NEUTRAL
from kvatlas.core.vocabulary import Saves, Tier
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Attend, Place, Stage, StageInfo


@register(
    "offload",
    StageInfo(
        summary="keys and values on the host, fetched layer by layer",
        paper="arXiv:2303.06865",
        saves=(Saves.CAPACITY,),
        traits=NEUTRAL,
    ),
)
@dataclass(frozen=True, kw_only=True)
class Offload(Place):
    """Hold keys and values on another tier and at most two layers of them on the device, or what was chosen of all.

    Args:
        to: the tier; ``host``.
        prefetch: fetch the next layer while this one computes; false: when it is needed.
        resident: tokens of each KV head and layer that stay on the device between steps, so that what a stage chooses
            again is not fetched again; those chosen the longest time ago give way. 0: none stay, and two layers take
            turns with one's room each.

    Raises:
        ConfigError: the tier is not ``host``, or a number is out of range.
    """

    tier: ClassVar[Tier] = Tier.HOST

    to: str = "host"
    prefetch: bool = True
    resident: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to != Tier.HOST:
            raise ConfigError(f"offload cannot place keys and values on {self.to!r}; write offload(host)")
        if self.resident < 0:
            raise ConfigError(f"offload: resident={self.resident} is out of range; write a number of tokens, or 0")

    def lacks(self, others: Collection[Stage]) -> str | None:
        """Ask for a stage that chooses, if something is to stay: everything that is read does not fit."""
        if not self.resident or any(isinstance(other, Attend) for other in others):
            return None
        return "'resident' keeps what a stage has chosen to read; add '| quest', or leave it out"

    @property
    def resident_tokens(self) -> int:
        """As asked for."""
        return self.resident

    @property
    def fetches_ahead(self) -> bool:
        """As asked for."""
        return self.prefetch
