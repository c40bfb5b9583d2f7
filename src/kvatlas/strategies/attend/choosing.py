"""Which of many scores are the best, whoever else is in the batch: equal ones go to the earlier.

``topk`` alone would not do: which of equal scores it takes depends on the count and the padding, and so on others.
Shapes: R sequences, H lanes of a layer, S slots or pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvatlas.core.views import Selection
from kvatlas.core.vocabulary import Per

if TYPE_CHECKING:
    from torch import Tensor


def best_pages(score_RHS: Tensor, number: int) -> Tensor:
    """Return the ``number`` best pages [R, H, number] of each lane, the best first."""
    return score_RHS.sort(dim=-1, descending=True, stable=True).indices[..., :number]


def best_slots(score_RHS: Tensor, count_RH: Tensor) -> Selection:
    """Return the ``count_RH`` best slots of each lane, ascending."""
    import torch  # strategies load without torch

    values = score_RHS.topk(int(count_RH.max()), dim=-1).values
    last = values.gather(-1, (count_RH - 1).clamp(min=0)[..., None])
    above, tied = score_RHS > last, score_RHS == last
    room = count_RH[..., None] - above.sum(dim=-1, keepdim=True)
    taken = above | (tied & (tied.cumsum(dim=-1) <= room))
    slots = torch.arange(score_RHS.shape[-1], device=score_RHS.device)
    index = slots.masked_fill(~taken, len(slots)).sort(dim=-1).values[..., : values.shape[-1]]
    return Selection(per=Per.SLOT, index_RHn=index.clamp(max=len(slots) - 1), count_RH=count_RH)
