"""Floating-point storage formats; without one of them, the cache uses the model's own."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.core.plan import INEXACT, NEUTRAL
from kvatlas.core.vocabulary import Format, Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Encode, StageInfo

_HALF = (Saves.CAPACITY, Saves.BANDWIDTH)


@register("fp32", StageInfo(summary="store as float32", paper="IEEE 754", traits=NEUTRAL))
@dataclass(frozen=True, kw_only=True)
class Fp32(Encode):
    """Store 4 bytes per element."""

    @property
    def format(self) -> Format:
        """As the name says."""
        return Format.FP32


@register("bf16", StageInfo(summary="store as bfloat16", paper="bfloat16", saves=_HALF, traits=INEXACT))
@dataclass(frozen=True, kw_only=True)
class Bf16(Encode):
    """Store 2 bytes per element, 8 bits of precision; exact where the model computes in bfloat16."""

    @property
    def format(self) -> Format:
        """As the name says."""
        return Format.BF16


@register("fp16", StageInfo(summary="store as float16", paper="IEEE 754", saves=_HALF, traits=INEXACT))
@dataclass(frozen=True, kw_only=True)
class Fp16(Encode):
    """Store 2 bytes per element, 11 bits of precision; exact where the model computes in float16."""

    @property
    def format(self) -> Format:
        """As the name says."""
        return Format.FP16
