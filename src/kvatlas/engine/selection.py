"""Which pages of a lane a decode step reads: those whose key bounds promise the highest scores.

Shapes: R sequences, H KV heads, C table columns, s slots of a block, m pages chosen.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvatlas.engine.sources import Beside, Blocks
from kvatlas.kernels.blocks import score_bounds
from kvatlas.kernels.pool import Entries, Part


def choose_pages(query: Tensor, cached: Blocks, side: Beside, most: int, slot: Tensor) -> Part:
    """Return the ``most`` most promising blocks of each lane, in order, that of the newest token always among them.

    Args:
        query: [R, Hq, Dk], rotated.
        cached: blocks without holes.
        side: what lies beside them, bounds of their keys among it.
        most: blocks of a lane to read, at least 1.
        slot: [R, H] int64, where the newest token is: not always the last slot, as it may have taken an evicted one's.
    """
    part = cached.part()
    if cached.table.shape[-1] <= most:
        return part
    size, length = cached.blocks.layout.block_size, cached.length
    columns = -(-length // size)
    blocks, table = side
    scores = score_bounds(query, Entries(pool=blocks.pool, name="bounds", table=table, length=length))
    newest = torch.arange(scores.shape[-1], device=scores.device) == (slot // size).to(scores.device)[..., None]
    # Equal scores go to the earlier block, whatever the padding: topk would let the batch decide.
    column = scores.masked_fill_(newest, torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    # Columns behind a short lane's end were chosen for want of others; they go last, behind its length.
    column = column.sort(dim=-1).values
    ends = (column == columns[..., None] - 1).any(dim=-1)  # only the last block may be partly filled
    chosen = columns.clamp(max=most) * size - torch.where(ends, columns * size - length, 0)
    return replace(part, table=cached.table.gather(-1, column), length=chosen)
