"""Ada-KV: heads of a layer whose attention is spread keep more, the others less, as many in all (arXiv:2407.11550).

The scores of all heads of a layer compete; how many of a head's are among the best of the layer is its share. A floor
keeps heads from starving. What is kept of each head is the *keep* stage's choice, as without this stage.

Differs from the official code: shares are rounded by largest remainders, so that the layer's total is kept exactly; the
scores are those of the *keep* stage beside it, so ``snapkv | ada`` pools over neighbours by their mean as SnapKV does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import INEXACT
from kvatlas.core.vocabulary import Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Budget, StageInfo

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "ada",
    StageInfo(
        summary="divide each layer's budget among its heads by their best scores",
        paper="arXiv:2407.11550",
        saves=(Saves.CAPACITY, Saves.BANDWIDTH),
        traits=INEXACT,
    ),
)
@dataclass(frozen=True, kw_only=True)
class Ada(Budget):
    """Let the heads of a layer share what they keep.

    Args:
        floor: share of an even division that every head has for certain, in [0, 1]; 1: evenly.

    Raises:
        ConfigError: ``floor`` is out of range.
    """

    ragged: ClassVar[bool] = True

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"ada: floor={self.floor} is out of range; write a fraction in [0, 1], such as 0.2")

    def most_of_lane(self, kept: int, lanes: int) -> int:
        """Return what a head keeps that has all the best scores."""
        return int(self.floor * kept + (1 - self.floor) * kept * lanes) + 1

    def counts(self, scores_BLHS: Tensor, kept_BL: Tensor) -> Tensor:
        """Return each head's floor, its share among the best of the layer, and what it holds for certain."""
        certain = scores_BLHS.isposinf().sum(dim=-1).minimum(kept_BL[..., None])
        even = kept_BL[..., None] - certain
        rivals = scores_BLHS.masked_fill(scores_BLHS.isposinf(), -float("inf")).sort(dim=-1, descending=True).values
        # The heads' best first, then their second bests: so equal scores go round among the heads in turn.
        order = rivals.transpose(2, 3).flatten(2).sort(dim=-1, descending=True, stable=True)
        slot = order.indices.new_tensor(range(order.values.shape[-1]))
        best = (slot < even.sum(dim=-1, keepdim=True)) & order.values.isfinite()
        won = certain.new_zeros(certain.shape).scatter_add_(-1, order.indices % scores_BLHS.shape[2], best.long())
        share = self.floor * even.double() + (1 - self.floor) * won.double()
        whole = share.floor().long()
        left = (even.sum(dim=-1, keepdim=True) - whole.sum(dim=-1, keepdim=True)).clamp(min=0)
        rank = (share - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return certain + whole + (rank < left).long()
