"""Keep every token: the lossless baseline, vLLM's policy of paged blocks (arXiv:2309.06180), not vLLM itself."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.core.plan import NEUTRAL
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Keep, StageInfo


@register(
    "full",
    StageInfo(
        summary="every token, in paged blocks (vLLM's policy, not vLLM)", paper="arXiv:2309.06180", traits=NEUTRAL
    ),
)
@dataclass(frozen=True, kw_only=True)
class Full(Keep):
    """Keep all tokens of a request until it ends."""
