"""Offloading: keys and values live on the host and visit the device layer by layer (FlexGen, arXiv:2303.06865).

Differs from FlexGen: batches are continuous rather than zig-zag blocks, attention runs on the device, and weights stay
where they are. A layer is fetched while the one before it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import NEUTRAL
from kvatlas.core.vocabulary import Saves, Tier
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Place, StageInfo


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
    """Hold keys and values on another tier and at most two layers of them on the device.

    Args:
        to: the tier; ``host``.
        prefetch: fetch the next layer while this one computes; false: when it is needed.

    Raises:
        ConfigError: the tier is not ``host``.
    """

    tier: ClassVar[Tier] = Tier.HOST

    to: str = "host"
    prefetch: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to != Tier.HOST:
            raise ConfigError(f"offload cannot place keys and values on {self.to!r}; write offload(host)")

    @property
    def fetches_ahead(self) -> bool:
        """As asked for."""
        return self.prefetch
