"""The KV store: sequences, their lanes' block tables, and the operations that write, drop and copy tokens.

Invariants:
- a lane with ``length`` slots in use holds exactly ceil(length / block_size) blocks;
- the slots [0, length) of a lane are live, except for at most one *hole*, which the next token overwrites;
- slots are in position order as long as ``Sequence.dense``; the position sidecar is the truth after that;
- only the last block of a lane of a shared sequence may be written to, and is copied first if others own it too;
- a sequence whose strategy packs old tokens has a companion row of encoded blocks: each lane begins there, in whole
  blocks, and goes on in the sequence's own row; slots of encoded blocks whose position is -1 are empty;
- a sequence with lanes on the host has a companion row of device blocks, *staging*, through which those lanes are read;
  where what was chosen of them stays, steps read them through another, its *residents*, which the host can do without;
- where streams are kept beside keys and values, each row of these has a *side* row: slot i of a lane has its entries in
  slot i there, whatever is appended, cut or moved, and a lane has at least as many blocks there.

Which blocks a lane has and how much of them is in use stands in `Tables`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from kvatlas.core.errors import CapacityError
from kvatlas.core.layout import DEFAULT_BLOCK_SIZE, GROUP, BlockLayout, layout_of
from kvatlas.core.plan import CachePlan, uniform_cache
from kvatlas.core.shapes import ModelShape
from kvatlas.core.units import format_bytes
from kvatlas.core.vocabulary import Format
from kvatlas.storage.arena import Arena, Books, LentBlocks, SideClass, copy_blocks
from kvatlas.storage.compaction import empty_a_slab
from kvatlas.storage.encoding import encode_front
from kvatlas.storage.lanes import KVGroup, LaneClasses, LaneGroup, LaneMap, SequenceLayout
from kvatlas.storage.link import Link
from kvatlas.storage.residents import ResidentSet
from kvatlas.storage.sequence import KVRow, LaneRow, Sequence, Slots
from kvatlas.storage.tables import Tables

G = TypeVar("G", bound=LaneGroup)

_BLOCKS_AT_ONCE = 4  # of a lane that are encoded before what they were is freed: both exist meanwhile


class _Claim(NamedTuple):
    """What a row needs for more tokens.

    Args:
        row: which.
        copies: shared blocks of each lane [lanes] int64 that must be copied.
        new: further blocks of each lane [lanes] int64.
        slots: how many slots [lanes] int64 are in use then; None: tokens take theirs when they are appended.
    """

    row: LaneRow
    copies: Tensor
    new: Tensor
    slots: Tensor | None


class KVStore:
    """Paged keys and values of many sequences of one model.

    Args:
        shape: the model.
        format: the model's own element format.
        budget_bytes: most bytes of keys, values and what is kept beside them.
        device: where they live.
        block_size: slots per block.
        host_bytes: most bytes on the host tier; 0: there is none.
        link: the way there; None: one of its own.

    Raises:
        CapacityError: the budget does not hold one block of every lane, or that of the host not one block.
    """

    def __init__(
        self,
        shape: ModelShape,
        format: Format,
        budget_bytes: int,
        device: torch.device | str = "cpu",
        block_size: int = DEFAULT_BLOCK_SIZE,
        host_bytes: int = 0,
        link: Link | None = None,
    ) -> None:
        self.lanes = LaneMap(shape)
        self.format = format
        self.block_size = block_size
        self.link = link or Link(device=device)
        possible = _possible_layouts(shape, format, block_size)
        self.arena = Arena(budget_bytes, possible, device)
        locked = self.arena.device.type == "cuda"
        self.host = Arena(host_bytes, possible, option="--host-memory", locked=locked) if host_bytes else None
        self._layouts: dict[CachePlan, SequenceLayout] = {}
        plain = self.layout(uniform_cache(shape, format, block_size))
        least = sum(len(group.lanes) * group.blocks.block_bytes for group in plain.groups)
        if least > self.arena.total_bytes:
            raise CapacityError(
                f"KV memory of {format_bytes(budget_bytes)} does not hold one block of each of the "
                f"{self.lanes.count} lanes ({format_bytes(least)}); give more memory (--kv-memory)"
            )
        self.tables = Tables(self.lanes.count, block_size)
        self._open: WeakSet[LaneRow] = WeakSet()

    @property
    def table(self) -> Tensor:
        """Block ids; see `Tables`."""
        return self.tables.table

    @property
    def length(self) -> Tensor:
        """Slots in use; see `Tables`."""
        return self.tables.length

    @property
    def hole(self) -> Tensor:
        """Slots that the next token takes; see `Tables`."""
        return self.tables.hole

    # Sequences

    def layout(self, plan: CachePlan) -> SequenceLayout:
        """Return the lane layout of sequences under a plan.

        Raises:
            CapacityError: layers are to be placed on the host, and there is no host tier; or a block is too large.
        """
        if plan.host_layers and self.host is None:
            raise CapacityError("there is no host tier to place keys and values on; give it memory (--host-memory)")
        if plan not in self._layouts:
            layout = SequenceLayout(self.lanes, self.arena, self.host, plan)
            for group in layout.all_groups():
                if not group.blocks.per_slab:
                    raise CapacityError(
                        f"a block of {format_bytes(group.blocks.block_bytes)} is larger than the "
                        f"{format_bytes(group.blocks.arena.slab_bytes)} that memory is divided into; keep less per "
                        "token or KV head, or take a smaller block size (--block-size) or more memory (--kv-memory)"
                    )
            self._layouts[plan] = layout
        return self._layouts[plan]

    def open(self, layout: SequenceLayout) -> Sequence:
        """Return a new, empty sequence."""
        starts = dict.fromkeys(self.lanes.windows, 0)
        seq = Sequence(row=self._take(), layout=layout, side=self._open_row(layout.side), starts=starts)
        seq.staging = self._open_row(layout.staging)
        if layout.residents is not None:
            seq.residents = ResidentSet(row=self._take(), layout=layout.residents)
        seq.records = self._open_row(layout.records)
        if layout.encoded is not None:
            seq.encoded = KVRow(row=self._take(), layout=layout.encoded, side=self._open_row(layout.encoded.side))
        self._open.update(seq.rows)
        return seq

    def _open_row(self, layout: LaneClasses | None) -> LaneRow | None:
        return None if layout is None else LaneRow(row=self._take(), layout=layout)

    def _take(self) -> int:
        return self.tables.take_row()

    def close(self, seq: Sequence) -> None:
        """Give all blocks of ``seq`` back; the sequence must not be used again."""
        self.release_reserved(seq)
        for row in seq.rows:
            self.release_columns(row, self.no_columns(), self.columns_held(row))
            self.free_row(row)

    def free_row(self, row: LaneRow) -> None:
        """Give a row of the tables back, once its blocks are somebody else's or nobody's."""
        self.tables.free_row(row.row)
        row.row = -1

    def no_columns(self) -> Tensor:
        """Return 0 for each lane [lanes] int64."""
        return torch.zeros(self.lanes.count, dtype=torch.int64)

    def fork(self, seq: Sequence) -> Sequence:
        """Return a second sequence with the same tokens; blocks are shared until one of the two writes.

        Only sequences that no strategy has evicted from can be forked.
        """
        assert seq.dense and seq.encoded is None and seq.records is None, "a lossy cache would need its own companions"
        self.release_reserved(seq)
        child = self.open(seq.layout)
        child.seen, child.starts, child.digests = seq.seen, dict(seq.starts), list(seq.digests)
        for row, copy in zip(seq.with_side, child.with_side, strict=True):
            self.tables.copy_row(row.row, copy.row)
            for group, ids in self.ids_between(row, self.no_columns(), self.columns_held(row)):
                group.blocks.arena.add_reference(group.blocks, ids)
        seq.shared = child.shared = seq.forked = child.forked = True
        return child

    def allocated_bytes(self, seq: Sequence, arena: Arena | None = None) -> int:
        """Return the bytes of all blocks of a tier that ``seq`` holds, shared blocks in full.

        Args:
            seq: the sequence, its companions included.
            arena: the tier; None for the device.
        """
        return sum(self.row_bytes(seq.rows, arena or self.arena))

    def row_bytes(self, rows: Seq[LaneRow], arena: Arena) -> list[int]:
        """Return the bytes of all blocks of a tier that each row holds."""
        if not rows:
            return []
        held = -(-self.length[[row.row for row in rows]] // self.block_size)
        total = torch.zeros(len(rows), dtype=torch.int64)
        for layout in {id(row.layout): row.layout for row in rows}.values():
            mine = torch.tensor([row.layout is layout for row in rows])
            for group in layout.groups:
                if group.blocks.arena is arena:
                    total += mine * held[:, group.lanes].sum(dim=1) * group.blocks.block_bytes
        return total.tolist()

    def kv_bytes(self, seq: Sequence) -> int:
        """Return the bytes of keys and values of all blocks that ``seq`` holds on any tier."""
        total = 0
        for row in seq.parts:
            held = self.columns_held(row)
            total += sum(int(held[group.lanes].sum()) * group.blocks.kv_bytes for group in row.layout.groups)
        return total

    def capacity_bytes(self, layout: SequenceLayout, arena: Arena | None = None) -> int:
        """Return the bytes that sequences of this layout could hold if they had a tier to themselves.

        Each further block class may leave one slab partly empty.

        Args:
            layout: of the sequences.
            arena: the tier; None for the device.
        """
        arena = arena or self.arena
        classes = {group.blocks for group in layout.all_groups() if group.blocks.arena is arena}
        slabs = max(0, arena.num_slabs - len(classes) + 1)
        return slabs * min((blocks.per_slab * blocks.block_bytes for blocks in classes), default=0)

    def books(self) -> Books:
        """Return where the bytes of the device tier are."""
        return self.arena.books()

    # Appending

    def blocks_needed(self, seq: Sequence, count: int, staged: int = 0) -> list[tuple[LaneGroup, int]]:
        """Return how many new blocks of each class ``count`` more tokens take, copies of shared blocks included.

        Args:
            seq: the sequence.
            count: tokens of every lane.
            staged: slots that each lane of a staging buffer shall have at least.
        """
        return self._needs(seq, self._claims(seq, count, staged))

    def _claims(self, seq: Sequence, count: int, staged: int) -> list[_Claim]:
        """Return what each row needs for ``count`` more tokens."""
        none = self.no_columns()
        copies = self._shared_tails(seq, seq) if seq.forked else none
        claims = [_Claim(seq, copies, self._new_columns(seq, count), None)]
        for row, slots in self._companion_slots(seq, count, staged):
            beside = self._shared_tails(seq, row) if seq.forked and row is seq.side else none
            claims.append(_Claim(row, beside, self._more_columns(row, slots), slots))
        return claims

    def _needs(self, seq: Sequence, claims: list[_Claim]) -> list[tuple[LaneGroup, int]]:
        needs = [
            (group, int((copies + new)[group.lanes].sum()))
            for row, copies, new, _ in claims
            for group in row.layout.groups
        ]
        if seq.encoded is not None:
            due = self.blocks_due(seq)
            needs += [(group, int(due[group.lanes].sum())) for group in seq.encoded.layout.groups]
        return needs

    def blocks_due(self, seq: Sequence) -> Tensor:
        """Return how many blocks of each lane [lanes] int64 are to be encoded; none of a lane with a hole."""
        if seq.encoded is None or not seq.encodes:
            return self.no_columns()
        due = (self.length[seq.row] - seq.layout.residual).clamp(min=0) // self.block_size
        return due * (self.hole[seq.row] < 0) * self.has_lanes(seq.encoded)

    def try_extend(self, seq: Sequence, count: int, staged: int = 0) -> bool:
        """Allocate room for ``count`` more tokens in every lane; False if it does not fit.

        Nothing is lost then, though old blocks may have been encoded.

        Args:
            seq: the sequence.
            count: tokens of every lane.
            staged: slots that each lane of a staging buffer shall have at least.
        """
        self.release_reserved(seq)
        if not self._try_encode(seq):
            return False
        claims = self._claims(seq, count, staged)
        granted = self.try_allocate(self._needs(seq, claims))
        if granted is None:
            return False
        try:
            for row, copies, new, slots in claims:
                for group in row.layout.groups:
                    self._enter(seq, row, group, copies, new, granted[0][1])
                    del granted[0]
                if slots is None:
                    seq.reserved = self.columns_held(seq) + new  # not before: only what is entered may be given back
                else:
                    self.tables.lengthen(row.row, slots)
        except BaseException:  # Ctrl-C too: what no table names would be lost
            _give_back(granted)
            raise
        seq.forked = False
        return True

    def _enter(
        self, seq: Sequence, row: LaneRow, group: LaneGroup, copies: Tensor, new: Tensor, granted: Tensor
    ) -> None:
        """Put granted blocks where a row shares its last ones with others, and behind what it has."""
        lanes = group.lanes[copies[group.lanes] > 0]
        if row is seq.records:
            assert isinstance(group.blocks, SideClass)
            group.blocks.fill(granted.long())
        self._copy_tails(row, self.length[seq.row, lanes] // self.block_size, group.blocks, lanes, granted)
        self.tables.enter(row.row, group.lanes, new, granted[len(lanes) :])

    def try_lie_beside(self, seq: Sequence, count: int) -> bool:
        """Allocate what lies beside the first ``count`` slots of an empty sequence; False if it does not fit.

        Blocks that hold its tokens already are entered next.
        """
        if seq.side is None:
            return True
        slots = torch.full((self.lanes.count,), count) * self.has_lanes(seq.side)
        new = self._more_columns(seq.side, slots)
        granted = self.try_allocate([(group, int(new[group.lanes].sum())) for group in seq.side.layout.groups])
        if granted is None:
            return False
        self.put(seq.side, new, granted)
        self.tables.lengthen(seq.side.row, slots)
        for group, ids in granted:
            assert isinstance(group.blocks, SideClass)
            group.blocks.fill(ids.long())
        return True

    def release_reserved(self, seq: Sequence) -> None:
        """Give back room that no token came into, because a step broke off between the two."""
        if seq.reserved is not None:
            self.release_columns(seq, self.columns_held(seq), seq.reserved)
            seq.reserved = None
            self.shrink_side(seq)

    def longest_on_host(self, seq: Sequence) -> tuple[int, int]:
        """Return the most slots of a lane whose new blocks live on the host, and of one whose encoded blocks do.

        What is due counts as encoded.
        """
        own, old = seq.layout.on_host
        most_own = int(self.length[seq.row, own].max()) if len(own) else 0
        if seq.encoded is None or not len(old):
            return most_own, 0
        encoded = self.length[seq.encoded.row] + self.blocks_due(seq) * self.block_size
        return most_own, int(encoded[old].max())

    def shrink_side(self, seq: Sequence) -> None:
        """Give back what lies beside slots that lanes no longer have."""
        if seq.side is not None:
            self._shrink(seq.side, self.length[seq.row])

    def shrink_staging(self, seq: Sequence, slots: int) -> None:
        """Give back what lanes on the host are not read through now, and of the rest what is beyond ``slots``."""
        for row in seq.passing:
            self._shrink(row, torch.full((self.lanes.count,), slots if row is seq.visited else 0))

    def mirror(self, seq: Sequence, *, in_use: bool) -> None:
        """Begin or cease to mirror what steps choose of lanes on the host, where that is asked for."""
        if seq.residents is not None and seq.residents.in_use is not in_use:
            seq.residents.in_use = in_use
            seq.residents.forget()
            self._shrink(seq.residents, self.no_columns())

    def _shrink(self, row: LaneRow, slots: Tensor) -> None:
        """Give back what a companion holds beyond ``slots`` [lanes] of each lane."""
        before = self.columns_held(row)
        self.tables.shorten(row.row, slots)
        self.release_columns(row, self.columns_held(row), before)

    def _companion_slots(self, seq: Sequence, count: int, staged: int) -> list[tuple[LaneRow, Tensor]]:
        """Return for each companion how many slots [lanes] int64 its lanes need when ``count`` tokens are added."""
        found = []
        if seq.visited is not None:
            found.append((seq.visited, torch.full((self.lanes.count,), staged)))
        if seq.side is not None:
            found.append((seq.side, self._tokens_held(seq) + count))
        if seq.records is not None:
            found.append((seq.records, torch.ones_like(self.length[seq.row])))
        return [(row, slots * self.has_lanes(row)) for row, slots in found]

    def has_lanes(self, row: LaneRow) -> Tensor:
        """Return 1 for each lane [lanes] int64 that has blocks in a row."""
        held = self.no_columns()
        for group in row.layout.groups:
            held[group.lanes] = 1
        return held

    def _more_columns(self, row: LaneRow, slots: Tensor) -> Tensor:
        return ((slots + (self.block_size - 1)) // self.block_size - self.columns_held(row)).clamp(min=0)

    def put(self, row: LaneRow, new: Tensor, granted: Seq[tuple[LaneGroup, Tensor]]) -> None:
        """Enter ``new`` [lanes] block ids per lane behind those that a row has."""
        for group, ids in granted:
            self.tables.enter(row.row, group.lanes, new, ids)

    def try_allocate(self, needs: Seq[tuple[G, int]]) -> list[tuple[G, Tensor]] | None:
        """Return block ids for every group, or None, and nothing taken, if they do not all fit."""
        granted, short = self._grant(needs)
        return granted if short is None else None

    def short_of(self, needs: Seq[tuple[LaneGroup, int]]) -> Arena | None:
        """Return a tier that has too few blocks for ``needs``, if there is one."""
        granted, short = self._grant(needs)
        _give_back(granted)
        return short

    def _grant(self, needs: Seq[tuple[G, int]]) -> tuple[list[tuple[G, Tensor]], Arena | None]:
        """Return block ids for every group; or nothing, and the tier that is short."""
        for group, number in needs:
            while number and group.blocks.arena.num_available(group.blocks) < number:
                if group.blocks.arena is not self.arena or not self._empty_a_slab(group.blocks):
                    return [], group.blocks.arena
        granted, short = _allocate(needs)
        if short is not None:  # classes compete for the last slabs: none may sit on more than it needs
            short.arena.return_idle_slabs()
            granted, short = _allocate(needs)
        while short is not None and short.arena is self.arena and self._empty_a_slab(short):
            granted, short = _allocate(needs)
        return granted, None if short is None else short.arena

    def _empty_a_slab(self, taker: LentBlocks) -> bool:
        """Make room for another class of device blocks by moving blocks together; False: there is none to be made."""
        return empty_a_slab(self.arena, taker, self.tables, [row for row in self._open if row.row >= 0])

    def append(self, seq: Sequence, count: int) -> Slots:
        """Take the next ``count`` slots of every lane for new tokens and note their positions.

        ``try_extend`` must have made the room. A sequence with holes takes one token here at a time through
        ``append_step``; close them first for more.
        """
        slot = self.tables.append(seq.row, count)
        seq.reserved = None
        seq.changed()
        column = (slot // self.block_size).T
        block = self.table[seq.row].long().gather(1, column).T
        side = None if seq.side is None else self.table[seq.side.row].long().gather(1, column).T
        slots = Slots(index=slot, block=block, offset=slot % self.block_size, side=side)
        positions = torch.arange(seq.seen, seq.seen + count, dtype=torch.int32)
        seq.seen += count
        self._note(seq.layout, slots, positions)
        return slots

    def append_step(self, seqs: Seq[Sequence]) -> Slots:
        """Take one slot of every lane for one new token of each sequence: its hole, else the next slot.

        All sequences have one layout. Returns block ids and offsets [R, lanes].
        """
        rows = torch.tensor([seq.row for seq in seqs])
        slot = self.tables.append_step(rows)
        column = (slot // self.block_size)[..., None]
        block = self.table[rows].long().gather(2, column).squeeze(-1)
        sides = [seq.side.row for seq in seqs if seq.side is not None]
        side = self.table[sides].long().gather(2, column).squeeze(-1) if sides else None
        slots = Slots(index=slot, block=block, offset=slot % self.block_size, side=side)
        self._note(seqs[0].layout, slots, torch.tensor([seq.seen for seq in seqs], dtype=torch.int32))
        for seq in seqs:
            seq.seen += 1
            seq.reserved = None
        return slots

    def needs_blocks(self, seqs: Seq[Sequence], staged: Seq[int]) -> list[bool]:
        """Return for each sequence whether one more token takes a new block in some lane or staging buffer.

        Args:
            seqs: the sequences.
            staged: slots that each lane of their staging buffers shall have at least.
        """
        rows = torch.tensor([seq.row for seq in seqs])
        full = ((self.hole[rows] < 0) & (self.length[rows] % self.block_size == 0)).any(dim=1).tolist()
        return [
            needs or seq.forked or self._stages_less(seq, slots) or self._encodes(seq)
            for needs, seq, slots in zip(full, seqs, staged, strict=True)
        ]

    def _encodes(self, seq: Sequence) -> bool:
        """Whether a block is due to be encoded."""
        return seq.encoded is not None and bool(self.blocks_due(seq).any())

    def _stages_less(self, seq: Sequence, slots: int) -> bool:
        """Whether what it is read through has fewer slots: it grows at its own pace, and begins anew after a swap."""
        return seq.visited is not None and int(self.columns_held(seq.visited).max()) * self.block_size < slots

    def _note(self, layout: SequenceLayout, slots: Slots, positions: Tensor) -> None:
        for group in layout.groups:
            device = group.blocks.device
            block, offset = slots.block[:, group.lanes].to(device), slots.offset[:, group.lanes].to(device)
            group.blocks.positions[block, offset] = positions.to(device)[:, None]
            if group.side is not None and group.side.filled:
                assert slots.side is not None
                side = slots.side[:, group.lanes].to(group.side.device)
                group.side.fill(side, slots.offset[:, group.lanes].to(group.side.device))

    # Encoding

    def _try_encode(self, seq: Sequence) -> bool:
        """Encode all blocks that are old enough, block after block; False if there is no room for one of them."""
        if seq.encoded is None:
            return True
        while (due := self.blocks_due(seq).clamp(max=_BLOCKS_AT_ONCE)).any():
            granted = self.try_allocate([(group, int(due[group.lanes].sum())) for group in seq.encoded.layout.groups])
            if granted is None:
                return False
            encode_front(self, seq, due, granted)
        return True

    def cut_front(self, row: KVRow, columns: Tensor, *, keep_side: bool = False) -> None:
        """Free the first ``columns`` [lanes] int64 blocks of each lane; the others move to the front of the table.

        Args:
            row: of which row.
            columns: how many.
            keep_side: the blocks beside them are somebody else's by now.
        """
        for each in row.with_side:
            if each is row or not keep_side:
                self.release_columns(each, torch.zeros_like(columns), columns)
            self.tables.drop_front(each.row, columns if each is row else columns * self.has_lanes(each))

    # Blocks

    def record_ids(self, seqs: Seq[Sequence], lanes: Tensor | slice) -> Tensor:
        """Return the blocks [R, H] int64 of what some lanes have one of."""
        rows = torch.tensor([seq.records.row for seq in seqs if seq.records is not None])
        return self.table[:, :, 0][rows][:, lanes].long()

    def columns_held(self, seq: LaneRow) -> Tensor:
        """Return the number of blocks of each lane [lanes] int64."""
        return self.tables.columns_held(seq.row)

    def _new_columns(self, seq: Sequence, count: int) -> Tensor:
        return self._more_columns(seq, self._tokens_held(seq) + count)

    def _tokens_held(self, seq: Sequence) -> Tensor:
        """Return the tokens of each lane [lanes] int64: a hole holds none."""
        return self.length[seq.row] if seq.dense else self.length[seq.row] - (self.hole[seq.row] >= 0).long()

    def _shared_tails(self, seq: Sequence, row: LaneRow) -> Tensor:
        """Return 1 for each lane [lanes] int64 whose partly filled last block, or that beside it, has another owner."""
        shared = self.no_columns()
        partial = self.length[seq.row] % self.block_size != 0
        for group in row.layout.groups:
            lanes = group.lanes[partial[group.lanes]]
            ids = self.table[row.row, lanes, self.length[seq.row, lanes] // self.block_size]
            shared[lanes] = (group.blocks.arena.num_owners(group.blocks, ids) > 1).long()
        return shared

    def _copy_tails(self, row: LaneRow, columns: Tensor, blocks: LentBlocks, lanes: Tensor, ids: Tensor) -> None:
        """Copy on write: put the first of ``ids`` in place of shared last blocks, in one column [H] of each lane."""
        if not len(lanes):
            return
        new, old = ids[: len(lanes)], self.table[row.row, lanes, columns]
        copy_blocks(blocks, old.long(), blocks, new.long())
        self.tables.replace(row.row, lanes, columns, new)
        blocks.arena.release(blocks, old)

    def ids_between(self, seq: LaneRow, low: Tensor, high: Tensor) -> list[tuple[LaneGroup, Tensor]]:
        """Return the block ids in columns [low, high) [lanes] of ``seq``, class by class."""
        return [(group, self.tables.ids_between(seq.row, group.lanes, low, high)) for group in seq.layout.groups]

    def release_columns(self, seq: LaneRow, low: Tensor, high: Tensor) -> None:
        """Give the blocks in columns [low, high) [lanes] back; the caller mends the table."""
        for group, ids in self.ids_between(seq, low, high):
            group.blocks.arena.release(group.blocks, ids)

    def shorten(self, seqs: Seq[Sequence], group: KVGroup, length: Tensor, beside: Tensor | None = None) -> None:
        """Cut the lanes of a group in some sequences to ``length`` [R, H] slots and free the blocks behind.

        Args:
            seqs: the sequences.
            group: the lanes.
            length: slots left.
            beside: slots [R, H] left beside them; None: as many.
        """
        rows = torch.tensor([seq.row for seq in seqs])
        group.blocks.arena.release(group.blocks, self.tables.cut(rows, group.lanes, length))
        if group.side is not None:
            ids = self.tables.cut(side_rows(seqs), group.lanes, length if beside is None else beside)
            group.side.arena.release(group.side, ids)

    def has_other_owners(self, rows: Tensor, group: LaneGroup) -> bool:
        """Whether some block of a group's lanes in some rows [R] is somebody else's, too."""
        owners = group.blocks.arena.num_owners(group.blocks, self.tables.held_ids(rows, group.lanes))
        return bool((owners > 1).any())


def _allocate(needs: Seq[tuple[G, int]]) -> tuple[list[tuple[G, Tensor]], LentBlocks | None]:
    """Return block ids for every group; or nothing, and the class that has too few."""
    granted: list[tuple[G, Tensor]] = []
    try:
        for group, number in needs:
            ids = group.blocks.arena.try_allocate(group.blocks, number)
            if ids is None:
                _give_back(granted)
                return [], group.blocks
            granted.append((group, ids))
    except BaseException:
        _give_back(granted)
        raise
    return granted, None


def _give_back(granted: Seq[tuple[LaneGroup, Tensor]]) -> None:
    for group, ids in granted:
        group.blocks.arena.release(group.blocks, ids)


def side_rows(seqs: Seq[KVRow]) -> Tensor:
    """Return the rows [R] int64 of what lies beside some rows, all of which have it."""
    return torch.tensor([seq.side.row for seq in seqs if seq.side is not None])


def _possible_layouts(shape: ModelShape, format: Format, block_size: int) -> list[BlockLayout]:
    """Return every layout of keys and values that a strategy may ask for, the model's own format first."""
    others = (other for other in Format if other is not format and (block_size == GROUP or not other.is_packed))
    formats = [format, *others]
    layers = [shape.layers[index] for index in shape.owners]
    return [layout_of(layer, each, block_size) for each in formats for layer in layers]
