"""InfiniGen's speculation: fetch only the tokens that the next layer will probably attend to (arXiv:2406.19707).

The input of a layer resembles that of the layer before it. So, one layer ahead, its queries are computed from the
earlier input and scored against *partial keys* on the device: a few columns of the keys after an orthogonal rotation
that gathers most of their weight in few columns. The tokens that score within ``alpha`` of a head's best are counted,
the count is averaged over heads, and as many of each lane's best are fetched.

Differs from the paper: models here rotate by position (RoPE), so the rotation cannot be folded into the projections and
is applied to rotated queries and keys at run time; a KV head that several query heads share is scored by the best of
them, and each of them reads its own best token even beyond the cap; the first layer, which nothing can be speculated
for, stays on the device; nothing is dropped from the host.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from kvatlas.core.errors import ConfigError
from kvatlas.core.needs import Artifact, Derived, LayerInputs, Need
from kvatlas.core.plan import Traits
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Attend, Keep, Place, Stage, StageInfo


@register(
    "speculate",
    StageInfo(
        summary="fetch the tokens that partial keys score within alpha of the best",
        paper="arXiv:2406.19707",
        saves=(Saves.BANDWIDTH,),
        traits=Traits(keeps_all=True, query_agnostic=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Speculate(Attend):
    """Choose what a decode step fetches, layer by layer.

    Args:
        alpha: tokens count as important if they score above a head's best minus alpha, in units of the softmax's
            argument; ``inf``: all do.
        cap: most tokens fetched, as a fraction of those cached, in (0, 1]; but never fewer than give each query head of
            the lane its best.
        partial: columns of the rotated keys that are kept on the device, as a fraction in (0, 1].
        dense: first layers that stay on the device and read everything, at least 1; more of them help where what a
            layer asks depends on the layer right before it, as in small models.

    Raises:
        ConfigError: a number is out of range.
    """

    alpha: float = 4.0
    cap: float = 0.2
    partial: float = 0.3
    dense: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise ConfigError(f"speculate: alpha={self.alpha} is out of range; write a number of at least 0, or inf")
        if self.dense < 1:
            raise ConfigError(f"speculate: dense={self.dense} is out of range; nothing foretells the first layer")
        for name in ("cap", "partial"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"speculate: {name}={getattr(self, name)} is out of range; write a fraction in (0, 1], such as 0.2"
                )

    def conflict(self, other: Stage) -> str | None:
        """Refuse stages that evict: partial keys lie slot by slot beside keys that never move."""
        if isinstance(other, Keep) and not other.info.traits.keeps_all:
            return "partial keys lie beside keys in order, and eviction would move those; leave one out"
        return None

    def lacks(self, others: Collection[Stage]) -> str | None:
        """Ask for a tier to fetch from."""
        if any(isinstance(other, Place) for other in others):
            return None
        return "it chooses what to fetch from another tier; add '| offload(host)'"

    def sized(self, fraction: float) -> Speculate:
        """Return it with another cap, and an alpha so large that the cap decides: else it would read less."""
        return replace(self, alpha=math.inf, cap=fraction)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return partial keys, slot by slot on the device, and what queries are foreseen and rotated with."""
        partial = Derived("partial", self.partial, unit="key_dim", dtype=None, label="partial keys", later=True)
        return (partial, LayerInputs(), Artifact("rotation", about="calibrated rotations"))

    @property
    def dense_layers(self) -> int:
        """As asked for; the first layer has none before it to speculate from."""
        return self.dense

    @property
    def margin(self) -> float:
        """Alpha."""
        return self.alpha

    def most_read(self, cached_tokens: int, group: int) -> int:
        """Return the cap in tokens, rounded up; 0.7 of 10 are 7, though not quite in binary fractions.

        Every query head reads its own best token, whatever the cap.
        """
        return min(cached_tokens, max(group, math.ceil(round(self.cap * cached_tokens, 6))))
