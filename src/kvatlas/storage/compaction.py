"""Move blocks together until a slab is empty, so that it can be lent to blocks of another layout.

Where a sequence's blocks are freed from the front, every slab may keep a few of its neighbours' and none comes free.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvatlas.storage.arena import Arena, LentBlocks, copy_blocks
from kvatlas.storage.sequence import LaneRow
from kvatlas.storage.tables import Tables


def empty_a_slab(arena: Arena, taker: LentBlocks, tables: Tables, rows: Iterable[LaneRow]) -> bool:
    """Empty one slab of another class than ``taker``; False, and nothing changed, where none can be.

    Blocks that several own, or that the prefix cache holds, stay where they are.

    Args:
        arena: whose slabs.
        taker: the class that is short of blocks.
        tables: rewritten where they name a moved block.
        rows: all rows that hold blocks.
    """
    for blocks in arena.classes():
        if blocks is taker or blocks.num_free < blocks.per_slab or not blocks.slabs:
            continue
        slabs = torch.tensor(sorted(blocks.slabs))
        refs, cached = blocks.refs.view(-1, blocks.per_slab)[slabs], blocks.in_cache.view(-1, blocks.per_slab)[slabs]
        movable = ~((refs > 1) | cached).any(dim=1)
        owned = (refs > 0).sum(dim=1).masked_fill(~movable, blocks.per_slab + 1)
        slab = int(slabs[owned.argmin()])
        if 0 < int(owned.min()) <= blocks.per_slab:
            _move(blocks, slab, tables, rows)
            return True
    return False


def _move(blocks: LentBlocks, slab: int, tables: Tables, rows: Iterable[LaneRow]) -> None:
    """Move all owned blocks of a slab to free places of others; there are enough."""
    first = slab * blocks.per_slab
    old = first + (blocks.refs[first : first + blocks.per_slab] > 0).nonzero().flatten()
    free = blocks.free_stack[: blocks.num_free].long()
    outside = free[(free < first) | (free >= first + blocks.per_slab)]
    new = outside[: len(old)]
    old_ids, new_ids = blocks.ids(old), blocks.ids(new)
    copy_blocks(blocks, old_ids.long(), blocks, new_ids.long())
    blocks.refs[new], blocks.refs[old] = 1, 0
    rest = free[~torch.isin(free, new)]
    blocks.free_stack[: blocks.num_free] = torch.cat([old, rest]).int()
    for row in rows:
        for group in row.layout.groups:
            if group.blocks is blocks:
                tables.rename(row.row, group.lanes, old_ids, new_ids)
