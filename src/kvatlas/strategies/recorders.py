"""Who keeps the records that several methods ask for: the last queries, and the moments of all.

Shapes: leading dimensions [..] are the heads of a prompt's layer, [H], or those of a step, [R, H].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvatlas.core.needs import QueryMoments, RecentQueries

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.plan import Recorder
    from kvatlas.core.views import ChunkView, TokenView


@dataclass(frozen=True)
class _Kept:
    """Keeps what it observes as it is."""

    need: RecentQueries | QueryMoments

    @property
    def kind(self) -> tuple[object, ...]:
        """What two of them must have in common to be one."""
        return type(self), self.need

    def begin(self, prompt: TokenView) -> Mapping[str, Tensor]:
        """Return nothing to set anew."""
        return {}


class _Recent(_Kept):
    """The last queries of a lane, oldest first."""

    def observe(self, name: str, chunk: ChunkView) -> Tensor:
        """Return the record [.., n * G * D] with the chunk's queries behind the others."""
        import torch  # strategies load without torch

        assert isinstance(self.need, RecentQueries)
        queries = chunk.query_HGnD.transpose(-3, -2)  # [.., n, G, D]
        kept = chunk.record(name)
        before = kept.view(*kept.shape[:-1], self.need.number, *queries.shape[-2:])
        return torch.cat([before, queries], dim=-3)[..., -self.need.number :, :, :].flatten(-3)


class _Moments(_Kept):
    """The number of queries, their sums, and the sums of their products, per query head."""

    def observe(self, name: str, chunk: ChunkView) -> Tensor:
        """Return the record [.., 1 + G * D + G * D * D] with the chunk's queries added."""
        import torch

        queries = chunk.query_HGnD
        count = torch.full((*queries.shape[:-3], 1), queries.shape[-2], dtype=queries.dtype, device=queries.device)
        products = queries.transpose(-2, -1) @ queries
        more = torch.cat([count, queries.sum(dim=-2).flatten(-2), products.flatten(-3)], dim=-1)
        return chunk.record(name) + more


def recorder_of(need: RecentQueries | QueryMoments) -> Recorder:
    """Return who keeps the record of a need."""
    return _Recent(need) if isinstance(need, RecentQueries) else _Moments(need)
