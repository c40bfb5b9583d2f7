"""KIVI: 2 or 4 bits, keys per channel, values per token, the newest tokens in floating point (arXiv:2402.02750).

A few channels of keys are much larger than the others, so keys share a scale along tokens, channel by channel; values
have no such channels and share one along channels, token by token. A block of 32 tokens is the group of the keys, 32
channels are that of the values. Tokens wait in floating point until they are older than the residual window and fill a
block, which is then encoded once and never rewritten.

Differs from the paper: its window of the keys grows to R tokens and is then encoded whole, that of the values slides
token by token; here both keep between R and R + 31 tokens. A prompt that is processed in chunks reads the chunks before
as they are stored. Layers with a sliding window stay in floating point. After eviction from encoded blocks (H2O),
two blocks that are half empty are merged, whose tokens are so encoded a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import Traits
from kvatlas.core.vocabulary import Format, Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Encode, StageInfo

_FORMATS = {2: Format.INT2, 4: Format.INT4}


@register(
    "kivi",
    StageInfo(
        summary="store old tokens in 2 or 4 bits, keys per channel and values per token",
        paper="arXiv:2402.02750",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=Traits(keeps_all=True, query_agnostic=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Kivi(Encode):
    """Encode full blocks that are older than the residual window.

    Args:
        bits: of one element, 2 or 4; scales add one bit.
        residual: newest tokens that stay in floating point, at least.

    Raises:
        ConfigError: a number is out of range.
    """

    bits: int = 2
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in _FORMATS:
            raise ConfigError(f"kivi: bits={self.bits} is not offered; write 2 or 4, or use the stage 'int8'")
        if self.residual < 0:
            raise ConfigError(f"kivi: residual={self.residual} is out of range; write a number of tokens, such as 128")

    @property
    def format(self) -> Format:
        """Format of encoded blocks."""
        return _FORMATS[self.bits]
