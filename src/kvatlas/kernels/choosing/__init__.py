"""What a selector chooses: the best of many scores of each lane, and the blocks that a choice leaves of it.

Shapes: R sequences, H lanes of a layer, n scores of a lane, C columns of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.kernels.choosing import native, torch_path
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.observed import observed

__all__ = ["choose_best", "cut_blocks"]


@observed
def choose_best(
    score: Tensor, number: Tensor | int, always: Tensor | None = None, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the best of each lane, ascending int64 [R, H, most], and how many these are [R, H]; padding is n - 1.

    Of equal scores the earlier is chosen, whoever else is in the batch; -inf and NaN never are.

    Args:
        score: [R, H, n] float32.
        number: how many to choose, of each lane [R, H] or of all.
        always: [R, H] int64, one that is among them in any case.
        most: the most of any lane; needed where ``number`` is a tensor.
    """
    if not isinstance(number, Tensor):
        most = number
        number = torch.full(score.shape[:2], number, device=score.device)
    assert most is not None
    most = min(most, score.shape[-1])
    if choose(score.device, native=True) == "native":
        return native.choose_best(score, number, always, most)
    return torch_path.choose_best(score, number, always, most)


@observed
def cut_blocks(
    table: Tensor, length: Tensor, index: Tensor, count: Tensor, first: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Return a table [R, H, n] of the chosen blocks of each lane, in order, and the slots in use of these [R, H].

    Args:
        table: [R, H, C] int32.
        length: [R, H] int64 slots in use of each lane.
        index: [R, H, n] int64, ascending, blocks counted from ``first`` on; others are not of these lanes.
        count: [R, H] int64, how many are meant.
        first: as above.
        block_size: slots of a block.
    """
    if choose(table.device, native=True) == "native":
        return native.cut_blocks(table, length, index, count, first, block_size)
    return torch_path.cut_blocks(table, length, index, count, first, block_size)
