"""Reading the slots of lanes out of a block pool.

Every plain-torch form reads blocks here and nowhere else; encoded formats come from ``kernels/blocks``.
``index_select`` along the strided first dimension is as fast as on contiguous memory and about five times faster
than advanced indexing.
Shapes: N blocks of the pool, C table columns, s slots of a block, D width of an entry.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvatlas.kernels.observed import observed
from kvatlas.kernels.pool import BlockPool


@observed
def gather_slots(pool: Tensor, table: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the slots of every table column, in table order, as a new tensor [..., C * s, D].

    Slots that no token occupies come back as they lie in memory: garbage, NaN included.

    Args:
        pool: [N, s, D], or [N, s] for one number per slot; the first dimension may be strided.
        table: [..., C] int32 or int64 block ids.
        dtype: what to cast to; None keeps the type of the pool.
    """
    blocks = torch.index_select(pool, 0, table.reshape(-1))
    slots = blocks.view(*table.shape[:-1], table.shape[-1] * pool.shape[1], *pool.shape[2:])
    return slots if dtype is None else slots.to(dtype)


def read_entries(pool: BlockPool, which: Literal["keys", "values"], table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys or values of every table column, decoded, as a new tensor [..., C * s, D].

    Slots that no token occupies come back as garbage, NaN included.

    Args:
        pool: blocks in any format.
        which: what to read of them.
        table: [..., C] block ids.
        dtype: what to cast to.
    """
    if pool.layout.format.is_float:
        return gather_slots(pool.keys if which == "keys" else pool.values, table, dtype)
    from kvatlas.kernels import blocks  # which gathers by this module

    return (blocks.read_keys if which == "keys" else blocks.read_values)(pool, table, dtype)


class SlotBuffer:
    """Memory that gathers use again and again, small enough to stay in the cache between writing and reading.

    Fresh memory of a few MiB costs more in page faults than the gather itself.

    Args:
        pool: [N, s, D], what to read.
        blocks: most blocks to hold at a time.
        dtype: what to cast to.
    """

    def __init__(self, pool: Tensor, blocks: int, dtype: torch.dtype) -> None:
        self.block_size, self.width = pool.shape[1:]
        self._pool = pool
        self._stored = pool.new_empty(blocks, self.block_size, self.width)
        self._cast = None if dtype == pool.dtype else torch.empty_like(self._stored, dtype=dtype)

    def read(self, table: Tensor) -> Tensor:
        """Return the slots of the table's columns [L, C * s, D], valid and writable until the next read.

        Args:
            table: [L, C] block ids.
        """
        blocks = self._stored[: table.numel()]
        torch.index_select(self._pool, 0, table.reshape(-1), out=blocks)
        if self._cast is not None:
            blocks = self._cast[: table.numel()].copy_(blocks)
        return blocks.view(table.shape[0], -1, self.width)


def read_lane(pool: Tensor, table: Tensor, length: int) -> Tensor:
    """Return the first ``length`` slots of one lane [length, D], slot by slot as the layout is defined.

    For the references: it shares nothing with :func:`gather_slots`.

    Args:
        pool: [N, s, D] or [N, s].
        table: [C] block ids of the lane.
        length: slots in use.
    """
    size = pool.shape[1]
    slots = [pool[int(table[i // size]), i % size] for i in range(length)]
    return torch.stack(slots) if slots else pool.new_empty((0, *pool.shape[2:]))
