"""Which blocks each lane of each sequence has, and how much of them is in use. Nobody else writes this.

Tensors over rows x lanes on the CPU; there is no object per block. A *row* is one sequence's share, or that of one of
its companions. A lane's slots [0, length) are in use, but for at most one *hole*, which the next token takes; a lane
that holds ``limit`` tokens after a step is cut. Columns behind a lane's last block hold ids left over from other times.

Shapes: R rows, H lanes, C columns, n blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_LIMIT = 2**40
"""Of a lane that may hold as many tokens as there are."""


class RowState(NamedTuple):
    """What a row says of its lanes, [lanes] int64 each, without its blocks."""

    length: Tensor
    hole: Tensor
    limit: Tensor


class Tables:
    """Rows of lanes.

    Args:
        num_lanes: lanes of a row.
        block_size: slots per block.

    Attributes:
        table: block ids, int32 [rows, lanes, C].
        length: slots in use, int64 [rows, lanes].
        hole: slot that the next token takes, int64 [rows, lanes]; -1: the slot behind the last.
        limit: tokens at which a step cuts, int64 [rows, lanes].
        free_rows: rows that are nobody's.
    """

    def __init__(self, num_lanes: int, block_size: int) -> None:
        self.block_size = block_size
        self.table = torch.zeros((4, num_lanes, 4), dtype=torch.int32)
        self.length = torch.zeros((4, num_lanes), dtype=torch.int64)
        self.hole = torch.full((4, num_lanes), -1, dtype=torch.int64)
        self.limit = torch.full((4, num_lanes), NO_LIMIT, dtype=torch.int64)
        self.free_rows = [3, 2, 1, 0]

    # Rows

    def take_row(self) -> int:
        """Return an empty row."""
        if not self.free_rows:
            self._grow_rows()
        row = self.free_rows.pop()
        self.table[row] = 0  # reads may run past a lane's end, and an id of another layout may lie outside its pool
        self.length[row] = 0
        self.hole[row] = -1
        self.limit[row] = NO_LIMIT
        return row

    def free_row(self, row: int) -> None:
        """Give a row back, once its blocks are somebody else's or nobody's."""
        self.length[row] = 0
        self.free_rows.append(row)

    def state(self, row: int) -> RowState:
        """Return what a row says of its lanes, to be put back by `restore`."""
        return RowState(self.length[row].clone(), self.hole[row].clone(), self.limit[row].clone())

    def restore(self, row: int, state: RowState) -> None:
        """Let a row say of its lanes what another said; its blocks have been entered."""
        self.length[row], self.hole[row], self.limit[row] = state

    def copy_row(self, source: int, target: int) -> None:
        """Give a row the blocks and lengths of another."""
        columns = int(self.columns_held(source).max())
        self.table[target, :, :columns] = self.table[source, :, :columns]
        self.length[target] = self.length[source]

    # Columns

    def columns_held(self, row: int) -> Tensor:
        """Return the number of blocks of each lane [lanes] int64."""
        return (self.length[row] + (self.block_size - 1)) // self.block_size

    def ids_between(self, row: int, lanes: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the block ids [n] int32 in columns [low, high) [all lanes] of some lanes, lane after lane."""
        columns = torch.arange(self.table.shape[2])
        mask = (columns >= low[lanes, None]) & (columns < high[lanes, None])
        return self.table[row, lanes][mask]

    def held_ids(self, rows: Tensor, lanes: Tensor) -> Tensor:
        """Return all block ids [n] int32 of some lanes of some rows [R]."""
        index = rows[:, None], lanes[None, :]
        held = -(-self.length[index] // self.block_size)
        most = int(held.max())
        return self.table[*index, :most][torch.arange(most) < held[..., None]]

    def enter(self, row: int, lanes: Tensor, new: Tensor, ids: Tensor) -> None:
        """Enter ``new`` [all lanes] ids [n] per lane behind the blocks that a lane's length speaks of."""
        held = self.columns_held(row)
        self.grow_columns(int((held + new).max()))
        lane = lanes.repeat_interleave(new[lanes])
        self.table[row, lane, _ragged_arange(new[lanes]) + held[lane]] = ids

    def append_columns(self, row: int, columns: Tensor) -> None:
        """Take all slots of the ``columns`` [lanes] blocks that were just entered behind full ones."""
        self.length[row] += columns * self.block_size

    def enter_all(self, row: int, ids: Tensor) -> None:
        """Give every lane of an empty row full blocks [lanes, C] int32."""
        self.grow_columns(ids.shape[1])
        self.table[row, :, : ids.shape[1]] = ids
        self.length[row] = ids.shape[1] * self.block_size

    def exchange(self, rows: Tensor, lanes: Tensor, table: Tensor, length: Tensor) -> None:
        """Give lanes of some rows [R] other blocks [R, H, C], with ``length`` [R, H] slots in use."""
        index = rows[:, None], lanes[None, :]
        self.grow_columns(table.shape[-1])
        self.table[*index, : table.shape[-1]] = table
        self.length[index] = length

    def replace(self, row: int, lanes: Tensor, columns: Tensor, ids: Tensor) -> Tensor:
        """Put ``ids`` [H] in one column [H] of each lane; return those that were there."""
        old = self.table[row, lanes, columns].clone()
        self.table[row, lanes, columns] = ids
        return old

    def rename(self, row: int, lanes: Tensor, old: Tensor, new: Tensor) -> None:
        """Let lanes name blocks that were moved: ``old`` [n], ascending, are ``new`` [n] now."""
        part = self.table[row, lanes]
        place = torch.searchsorted(old, part).clamp(max=len(old) - 1)
        self.table[row, lanes] = torch.where(old[place] == part, new[place], part)

    def drop_front(self, row: int, columns: Tensor) -> None:
        """Take the first ``columns`` [lanes] int64 blocks, all full, out of each lane; the others move to the front."""
        width = self.table.shape[2]
        index = (torch.arange(width) + columns[:, None]).clamp(max=width - 1)
        self.table[row] = self.table[row].gather(1, index)
        self.length[row] -= columns * self.block_size

    def take_out(self, row: int, lanes: Tensor, gone: Tensor) -> None:
        """Take full blocks out of the middle of lanes; ``gone`` bool [H, C] says which of the first C columns."""
        width = gone.shape[1]
        order = gone.int().sort(dim=1, stable=True).indices
        self.table[row, lanes, :width] = self.table[row, lanes, :width].gather(1, order)
        self.length[row, lanes] -= gone.sum(dim=1) * self.block_size

    # Slots

    def append(self, row: int, count: int) -> Tensor:
        """Take ``count`` slots behind the last of every lane; return them [count, lanes]."""
        slot = self.length[row][None, :] + torch.arange(count)[:, None]
        self.length[row] += count
        return slot

    def append_step(self, rows: Tensor) -> Tensor:
        """Take one slot of every lane of some rows [R], its hole if it has one; return them [R, lanes]."""
        hole, length = self.hole[rows], self.length[rows]
        self.length[rows] = length + (hole < 0)
        self.hole[rows] = -1
        return torch.where(hole >= 0, hole, length)

    def open_holes(self, rows: Tensor, lanes: Tensor, slots: Tensor) -> None:
        """Make one slot [R, H] of each lane a hole; -1: none."""
        self.hole[rows[:, None], lanes[None, :]] = slots

    def close_holes(self, row: int, lanes: Tensor) -> None:
        """Shorten lanes by the slot whose token has moved into their hole."""
        self.length[row, lanes] -= 1
        self.hole[row, lanes] = -1

    def lengthen(self, row: int, slots: Tensor) -> None:
        """Let each lane have at least ``slots`` [lanes] in use."""
        self.length[row] = torch.maximum(self.length[row], slots)

    def shorten(self, row: int, slots: Tensor) -> None:
        """Let each lane have at most ``slots`` [lanes] in use."""
        self.length[row] = torch.minimum(self.length[row], slots)

    def cut(self, rows: Tensor, lanes: Tensor, length: Tensor) -> Tensor:
        """Cut lanes of some rows [R] to ``length`` [R, H] slots; return the blocks behind [n] int32."""
        index = rows[:, None], lanes[None, :]
        held, keep = (-(-slots // self.block_size) for slots in (self.length[index], length))
        columns = torch.arange(int(held.max()))
        behind = (columns >= keep[..., None]) & (columns < held[..., None])
        ids = self.table[*index, : len(columns)][behind]
        self.length[index] = length
        return ids

    def set_limits(self, rows: Tensor, lanes: Tensor, limit: Tensor) -> None:
        """Say at how many tokens [R, H] lanes of some rows [R] are cut."""
        self.limit[rows[:, None], lanes[None, :]] = limit

    # Room

    def grow_columns(self, columns: int) -> None:
        """Make the tables at least ``columns`` blocks wide."""
        if columns > self.table.shape[2]:
            wider = max(columns, 2 * self.table.shape[2]) - self.table.shape[2]
            self.table = torch.nn.functional.pad(self.table, (0, wider))

    def _grow_rows(self) -> None:
        rows = len(self.table)
        self.table = torch.cat([self.table, torch.zeros_like(self.table)])
        self.length = torch.cat([self.length, torch.zeros_like(self.length)])
        self.hole = torch.cat([self.hole, torch.full_like(self.hole, -1)])
        self.limit = torch.cat([self.limit, torch.full_like(self.limit, NO_LIMIT)])
        self.free_rows += range(2 * rows - 1, rows - 1, -1)


def _ragged_arange(counts: Tensor) -> Tensor:
    """Return 0..c-1 for each count c, concatenated, int64."""
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0) - (ends - counts).repeat_interleave(counts)
