"""Where a segment reads one layer: encoded blocks of old tokens, if any, then blocks at home or visiting.

Shapes: R sequences, H KV heads, C table columns, s slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.engine.segments import OldBlocks
from kvatlas.kernels.pool import Entries, Part
from kvatlas.storage.arena import BlockClass, SideClass
from kvatlas.storage.lanes import SequenceLayout

Beside = tuple[SideClass, Tensor]
"""Class and table [.., H, C] of what lies beside blocks."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of some lanes.

    Args:
        blocks: of which class.
        table: [R, H, C] int32, trimmed to the longest lane.
        length: [R, H] int64 slots in use, on the device.
        host_length: the same on the CPU.
        side: class and table of what lies beside them; None: nothing does.
    """

    blocks: BlockClass
    table: Tensor
    length: Tensor
    host_length: Tensor
    side: Beside | None = None

    @classmethod
    def of(
        cls, blocks: BlockClass, table: Tensor, length: Tensor, host_length: Tensor, side: Beside | None = None
    ) -> Blocks:
        """Return the blocks of tables that may be wider than needed."""
        columns = -(-int(host_length.max()) // blocks.layout.block_size)
        trimmed = None if side is None else (side[0], side[1][..., :columns])
        return cls(blocks=blocks, table=table[..., :columns], length=length, host_length=host_length, side=trimmed)

    def trimmed(self) -> Blocks:
        """Return them without the columns behind the longest lane."""
        return Blocks.of(self.blocks, self.table, self.length, self.host_length, self.side)

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
        side = None if self.side is None else (self.side[0], self.side[1][0])
        return Blocks(
            blocks=self.blocks, table=self.table[0], length=self.length[0], host_length=self.host_length[0], side=side
        )

    def entries(self, name: str) -> Entries:
        """Return where the entries of a stream lie."""
        assert self.side is not None
        return Entries(pool=self.side[0].pool, name=name, table=self.side[1], length=self.length)

    def clear_received(self, held: Tensor) -> None:
        """Forget the attention that the slots have received; ``held`` is what `held` returned."""
        assert self.side is not None
        blocks, table = self.side
        blocks.pool.view("received").squeeze(-1).index_fill_(0, table.flatten()[held].long(), 0.0)

    def add_received(self, amounts: Tensor, held: Tensor, over: str, *, fresh: bool = False) -> None:
        """Put ``amounts`` [.., H, C * s] to the attention that the slots have received.

        Args:
            amounts: attention received.
            held: what `held` returned.
            over: how they are put together, as `Received` has it.
            fresh: forget what they have received before.
        """
        assert self.side is not None
        blocks, table = self.side
        sums = blocks.pool.view("received").squeeze(-1)
        ids = table.flatten()[held].long()
        if fresh:
            self.clear_received(held)
        amounts = amounts.reshape(-1, sums.shape[1])[held]
        if over == "max":
            sums.index_copy_(0, ids, torch.maximum(sums.index_select(0, ids), amounts))
        else:
            sums.index_add_(0, ids, amounts)


def old_blocks(layout: SequenceLayout, old: OldBlocks | None, layer: int, lanes: slice) -> Blocks | None:
    """Return the encoded blocks of a layer's lanes; None if there are none."""
    if old is None or layout.encoded is None or not layout.encoded.holds(layer):
        return None
    if not int(old.host_length[..., lanes].max()):
        return None
    side = layout.encoded.side_of_layer(layer)
    beside = None if side is None or old.side is None else (side, old.side[..., lanes, :])
    blocks = layout.encoded.of_layer(layer)
    return Blocks.of(blocks, old.table[..., lanes, :], old.length[..., lanes], old.host_length[..., lanes], beside)
