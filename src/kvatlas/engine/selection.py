"""Which pages of a lane a decode step reads: those whose key bounds promise the highest scores.

Shapes: R sequences, H KV heads, C table columns, s slots of a block, m pages chosen.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvatlas.engine.sources import Blocks
from kvatlas.kernels.blocks import score_bounds


def choose_pages(query: Tensor, cached: Blocks, most: int) -> Blocks:
    """Return the ``most`` most promising blocks of each lane, in order, the newest always among them.

    Args:
        query: [R, Hq, Dk], rotated.
        cached: blocks with key bounds.
        most: blocks of a lane to read, at least 1.
    """
    if cached.table.shape[-1] <= most:
        return cached
    size, length = cached.blocks.layout.block_size, cached.length
    columns = -(-length // size)
    scores = score_bounds(query, cached.part())
    newest = torch.arange(scores.shape[-1], device=scores.device) == columns[..., None] - 1
    column = scores.masked_fill_(newest, torch.inf).topk(most, dim=-1).indices
    # Columns behind a short lane's end were chosen for want of others; they go last, behind its length.
    column = column.sort(dim=-1).values
    left_out = (columns - most).clamp(min=0)
    host_columns = -(-cached.host_length // size)
    return replace(
        cached,
        table=cached.table.gather(-1, column),
        length=length - left_out * size,
        host_length=cached.host_length - (host_columns - most).clamp(min=0) * size,
    )
