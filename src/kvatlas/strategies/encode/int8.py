"""8-bit integers with one scale per token and head; written token by token, so every other stage goes with it."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.core.plan import INEXACT
from kvatlas.core.vocabulary import Format, Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Encode, StageInfo


@register(
    "int8",
    StageInfo(
        summary="store as 8-bit integers, one scale per token",
        paper="symmetric round-to-nearest",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=INEXACT,
    ),
)
@dataclass(frozen=True, kw_only=True)
class Int8(Encode):
    """Store 1 byte per element and a float16 scale per token, of keys and of values."""

    @property
    def format(self) -> Format:
        """As the name says."""
        return Format.INT8
