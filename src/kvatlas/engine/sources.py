"""Where a segment reads one layer: encoded blocks of old tokens, if any, then blocks at home or visiting.

Shapes: R sequences, H KV heads, C table columns, s slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.engine.segments import OldBlocks
from kvatlas.kernels.pool import Part
from kvatlas.storage.arena import BlockClass


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of some lanes.

    Args:
        blocks: of which class.
        table: [R, H, C] int32, trimmed to the longest lane.
        length: [R, H] int64 slots in use, on the device.
        host_length: the same on the CPU.
    """

    blocks: BlockClass
    table: Tensor
    length: Tensor
    host_length: Tensor

    @classmethod
    def of(cls, blocks: BlockClass, table: Tensor, length: Tensor, host_length: Tensor) -> Blocks:
        """Return the blocks of a table that may be wider than needed."""
        columns = -(-int(host_length.max()) // blocks.layout.block_size)
        return cls(blocks=blocks, table=table[..., :columns], length=length, host_length=host_length)

    def part(self, *, hide_empty: bool = False, dense_start: int | None = None) -> Part:
        """Return them as kernels take them."""
        return Part(
            pool=self.blocks.pool,
            table=self.table,
            length=self.length,
            hide_empty=hide_empty,
            dense_start=dense_start,
        )

    def held(self) -> Tensor:
        """Return which entries of the table, flattened, are blocks of their lane: int64 indices [n].

        What stands behind a lane's last block is left over from other times and must not be written to.
        """
        columns = -(-self.host_length // self.blocks.layout.block_size)
        mask = torch.arange(self.table.shape[-1]) < columns[..., None]
        return mask.flatten().nonzero().flatten().to(self.table.device)

    def first(self) -> Blocks:
        """Return the blocks of the first sequence, [H, C]."""
        return Blocks(blocks=self.blocks, table=self.table[0], length=self.length[0], host_length=self.host_length[0])

    def add_to_sums(self, amounts: Tensor, held: Tensor, *, fresh: bool = False) -> None:
        """Add ``amounts`` [.., H, C * s] to the column sums of the slots.

        Args:
            amounts: attention received.
            held: what `held` returned.
            fresh: forget what they have received before.
        """
        sums = self.blocks.column_sums
        assert sums is not None
        ids = self.table.flatten()[held].long().to(sums.device)
        if fresh:
            sums.index_fill_(0, ids, 0.0)
        sums.index_add_(0, ids, amounts.reshape(-1, sums.shape[1])[held].to(sums.device))


def old_blocks(blocks: BlockClass | None, old: OldBlocks | None, lanes: slice) -> Blocks | None:
    """Return the encoded blocks of a layer's lanes; None if there are none."""
    if blocks is None or old is None or not int(old.host_length[..., lanes].max()):
        return None
    return Blocks.of(blocks, old.table[..., lanes, :], old.length[..., lanes], old.host_length[..., lanes])
