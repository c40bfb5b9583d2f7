"""InfiniGen's rehearsal: fetch only the tokens that the next layer will probably attend to (arXiv:2406.19707).

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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.needs import Artifact, Derived, LayerInputs, Need, Record
from kvatlas.core.plan import Traits
from kvatlas.core.views import Selection
from kvatlas.core.vocabulary import Per, Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Attend, Place, Stage, StageInfo

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import ChunkView, Given, QueryView, TokenView


@register(
    "rehearse",
    StageInfo(
        summary="fetch the tokens that partial keys score within alpha of the best",
        paper="arXiv:2406.19707",
        saves=(Saves.BANDWIDTH,),
        traits=Traits(keeps_all=True, query_agnostic=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Rehearse(Attend):
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

    ahead: ClassVar[bool] = True

    alpha: float = 4.0
    cap: float = 0.2
    partial: float = 0.3
    dense: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise ConfigError(f"rehearse: alpha={self.alpha} is out of range; write a number of at least 0, or inf")
        if self.dense < 1:
            raise ConfigError(f"rehearse: dense={self.dense} is out of range; nothing foretells the first layer")
        for name in ("cap", "partial"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"rehearse: {name}={getattr(self, name)} is out of range; write a fraction in (0, 1], such as 0.2"
                )

    def lacks(self, others: Collection[Stage]) -> str | None:
        """Ask for a tier to fetch from."""
        if any(isinstance(other, Place) for other in others):
            return None
        return "it chooses what to fetch from another tier; add '| offload(host)'"

    def sized(self, fraction: float) -> Rehearse:
        """Return it with another cap, and an alpha so large that the cap decides: else it would read less."""
        return replace(self, alpha=math.inf, cap=fraction)

    @property
    def dense_layers(self) -> int:
        """As asked for; the first layer has none before it to speculate from."""
        return self.dense

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return partial keys on the device, which columns these are, and what foresees and rotates queries."""
        return (
            Derived("partial", self.partial, unit="key_dim", dtype=None, label="partial keys", later=True),
            Record("columns", self.partial, unit="key_dim", dtype="int32", label="chosen columns"),
            Record("energy", unit="key_dim", label="weights of columns"),
            LayerInputs(),
            Artifact("rotation", build="kvatlas.models.rotation:rotations_of", about="calibrated rotations"),
        )

    def observe(self, name: str, chunk: ChunkView) -> Tensor:
        """Add what the prompt's queries and keys weigh in each rotated column."""
        if name != "energy":
            return chunk.record(name)
        rotate = chunk.artifact("rotation").rotate
        queries, keys = rotate(chunk.query_HGnD.flatten(1, 2)), rotate(chunk.key_HnD)
        more: Tensor = queries.abs().sum(dim=1) + keys.abs().sum(dim=1)
        return chunk.record(name) + more

    def begin(self, prompt: TokenView) -> Mapping[str, Tensor]:
        """Choose the heaviest columns of each lane, from now on."""
        width = prompt.record("columns").shape[-1]
        return {"columns": prompt.record("energy").topk(width, dim=-1).indices.sort(dim=-1).values}

    def derive(self, name: str, tokens: TokenView) -> Tensor:
        """Return the chosen columns of the rotated keys."""
        return self._cut(tokens, tokens.keys())

    def _cut(self, given: Given, heads: Tensor) -> Tensor:
        rotated: Tensor = given.artifact("rotation").rotate(heads)
        columns = given.record("columns").long().unsqueeze(-2)
        return rotated.gather(-1, columns.expand(*rotated.shape[:-1], columns.shape[-1]))

    def most_read(self, cached_tokens: int, group: int, block_size: int = 1) -> int:
        """Return the cap in tokens, rounded up; 0.7 of 10 are 7, though not quite in binary fractions.

        Every query head reads its own best token, whatever the cap.
        """
        return min(cached_tokens, max(group, math.ceil(round(self.cap * cached_tokens, 6))))

    def select(self, view: QueryView) -> Selection:
        """Return the slots whose partial keys score best for any of a lane's query heads."""
        import torch  # strategies load without torch

        rotation, group = view.artifact("rotation"), view.query_RHGD.shape[2]
        below = rotation.below_best(self._cut(view, view.query_RHGD), view.side("partial").float(), view.length_RH)
        most = [[self.most_read(count, group) for count in lanes] for lanes in view.length_RH.tolist()]
        found = choose(below, self.alpha, torch.tensor(most))
        # Of a batch's heads, some may read more than a short lane has.
        return replace(found, count_RH=torch.minimum(found.count_RH, view.length_RH.to(found.count_RH.device)))


def choose(below_RHGS: Tensor, alpha: float, most_RH: Tensor) -> Selection:
    """Return for each lane the slots that score best for any of its query heads.

    How many: those within ``alpha`` of a query head's best, averaged over all query heads of the layer, rounded up; at
    most ``most_RH`` [R, H], but never so few that a query head would miss its own best slot. What a sequence is given
    depends on its scores alone, not on who shares the batch: equal scores go to the earlier slot, and NaN counts as
    -inf, which is also what pads.

    Args:
        below_RHGS: how far each slot scores below its query head's best.
        alpha: as above.
        most_RH: as above.
    """
    import torch

    from kvatlas.kernels.choosing import choose_best

    below_RHGS = below_RHGS.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    important = (below_RHGS > -alpha).sum(dim=-1).float().mean(dim=(1, 2)).ceil().long()[:, None]
    # A head's favourite has infinity, and every slot else what the head says that likes it best.
    best = below_RHGS.amax(dim=2).scatter_(-1, below_RHGS.argmax(dim=-1), torch.inf)
    favourites = best.isposinf().sum(dim=-1).amax(dim=-1, keepdim=True)
    count = torch.maximum(torch.minimum(important, most_RH.to(best.device)), favourites)
    best = best.clamp(min=torch.finfo(best.dtype).min)  # who has no better ones chooses its first
    index, count = choose_best(best, count, most=int(count.max()))
    return Selection(per=Per.SLOT, index_RHn=index, count_RH=count)
