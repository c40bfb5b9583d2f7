"""What storage does when a strategy has answered: cut lanes to chosen slots, open holes, drop passed windows.

Shapes: R sequences of one layout, H lanes of one group, S slots padded to the longest lane, n slots kept.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvatlas.kernels.blocks import read_keys, read_values
from kvatlas.storage.arena import BlockClass, SideClass
from kvatlas.storage.encoding import derive_moved, empty_slots, move_slots, move_tokens
from kvatlas.storage.lanes import KVGroup
from kvatlas.storage.sequence import KVRow, Sequence
from kvatlas.storage.store import KVStore, side_rows

if TYPE_CHECKING:
    from kvatlas.storage.prefix_cache import PrefixCache


@dataclass(frozen=True, kw_only=True)
class LaneSlots:
    """The slots of some lanes, encoded blocks first, then the sequence's own.

    Args:
        positions: int32 [R, H, S].
        live: bool [R, H, S], which slots hold a token.
        num_old: how many of the S are encoded.
        tables: the blocks of both parts, and their tables [R, H, C].
        sides: what lies beside them, likewise; empty where nothing does.
    """

    positions: Tensor
    live: Tensor
    num_old: int
    tables: list[tuple[BlockClass, Tensor]]
    sides: list[tuple[SideClass, Tensor]]

    def read(self, what: str) -> Tensor:
        """Return ``"keys"`` or ``"values"`` of all slots, float32 [R, H, S, D]; garbage where none is live."""
        reader = {"keys": read_keys, "values": read_values}[what]
        parts = [reader(blocks.pool, table.to(blocks.device), torch.float32) for blocks, table in self.tables]
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].device) for part in parts], dim=-2)

    def side(self, name: str) -> Tensor:
        """Return the entries of a stream [R, H, S, width] of all slots."""
        parts = []
        for blocks, table in self.sides:
            entries = blocks.pool.view(name).index_select(0, table.flatten().to(blocks.device))
            parts.append(entries.view(*table.shape, *entries.shape[1:]).flatten(2, 3).to(self.positions.device))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def lane_slots(store: KVStore, seqs: Seq[Sequence], group: KVGroup) -> LaneSlots:
    """Return the slots of a group's lanes."""
    rows: list[tuple[list[KVRow], BlockClass]] = [([*seqs], group.blocks)]
    if group.old is not None:
        rows.insert(0, ([seq.encoded for seq in seqs if seq.encoded is not None], group.old))
    parts = [_slots(store, members, group, blocks) for members, blocks in rows]
    if len(parts) == 1:
        return parts[0]
    old, own = parts
    device = own.positions.device
    return LaneSlots(
        positions=torch.cat([old.positions.to(device), own.positions], dim=-1),
        live=torch.cat([old.live.to(device), own.live], dim=-1),
        num_old=old.live.shape[-1],
        tables=old.tables + own.tables,
        sides=old.sides + own.sides,
    )


def _slots(store: KVStore, rows: Seq[KVRow], group: KVGroup, blocks: BlockClass) -> LaneSlots:
    """Return the slots of some rows of the tables."""
    row, size, lanes = torch.tensor([each.row for each in rows]), store.block_size, group.lanes
    length, hole = store.length[row][:, lanes], store.hole[row][:, lanes]
    columns = -(-int(length.max()) // size)
    table = store.table[row[:, None], lanes[None, :], :columns]
    flat, shape = table.flatten().to(blocks.device), (len(rows), len(lanes), columns * size)
    slot = torch.arange(columns * size)
    positions = blocks.positions.index_select(0, flat).view(shape)
    live = ((slot < length[..., None]) & (slot != hole[..., None])).to(blocks.device) & (positions >= 0)
    sides = []
    if group.side is not None:
        sides.append((group.side, store.table[side_rows(rows)[:, None], lanes[None, :], :columns]))
    return LaneSlots(positions=positions, live=live, num_old=0, tables=[(blocks, table)], sides=sides)


def open_holes(store: KVStore, seqs: Seq[Sequence], group: KVGroup, victims: Tensor, num_old: int) -> None:
    """Evict slot ``victims`` [R, H] int64 of each lane (-1: none), numbered as `lane_slots` does.

    A slot of the sequence's own is a hole, which the next token overwrites; one of an encoded block stays empty.
    """
    rows, victims = torch.tensor([seq.row for seq in seqs]), victims.cpu()
    store.tables.open_holes(rows, group.lanes, (victims - num_old).clamp(min=-1))
    for seq in seqs:
        seq.dense = False
    if num_old:
        emptied = torch.arange(num_old) == victims[..., None]
        for seq, slots in zip(seqs, emptied, strict=True):
            _empty(store, seq, group, slots)


def cut(
    store: KVStore,
    seqs: Seq[Sequence],
    group: KVGroup,
    kept: Tensor,
    count: Tensor,
    num_old: int = 0,
    prefixes: PrefixCache | None = None,
) -> None:
    """Cut each lane to some of its slots and free the blocks behind.

    Where the prefix cache has the blocks as well, they are left to it, and what is kept moves to new ones (copy on
    cut); where there is no room for those, the cache gives the blocks up.

    Args:
        store: holds the tables.
        seqs: whose lanes; they have no hole, and no other sequence owns a block of theirs.
        group: which lanes.
        kept: [R, H, n] int64, ascending, numbered as `lane_slots` does, on the CPU.
        count: [R, H] int64, how many of each lane's are meant.
        num_old: how many slots of `lane_slots` are encoded: those that go leave an empty slot.
        prefixes: the prefix cache, if there is one.
    """
    for seq in seqs:
        seq.changed()
    if num_old:
        for index, seq in enumerate(seqs):
            _cut_encoded(store, seq, group, kept[index], count[index], num_old)
        used = torch.arange(kept.shape[-1]) < count[..., None]
        own = used & (kept >= num_old)
        order = own.logical_not().int().sort(dim=-1, stable=True).indices
        kept, count = kept.gather(-1, order) - num_old, own.sum(dim=-1)
    _keep_slots(store, seqs, group, kept, count, prefixes)


def _cut_encoded(store: KVStore, seq: Sequence, group: KVGroup, kept: Tensor, count: Tensor, num_old: int) -> None:
    """Forget the tokens of encoded blocks that are not kept."""
    old = (torch.arange(kept.shape[-1]) < count[:, None]) & (kept < num_old)
    emptied = torch.ones(len(kept), num_old, dtype=torch.bool)
    lane = torch.arange(len(kept))[:, None].expand_as(kept)
    emptied[lane[old], kept[old]] = False
    _empty(store, seq, group, emptied)


def _empty(store: KVStore, seq: Sequence, group: KVGroup, emptied: Tensor) -> None:
    """Forget tokens of encoded blocks; ``emptied`` [H, S] may name slots behind a lane's end."""
    assert group.old is not None and seq.encoded is not None
    seq.changed()
    length = store.length[seq.encoded.row, group.lanes]
    own = emptied & (torch.arange(emptied.shape[1]) < length[:, None])
    empty_slots(store, seq, replace(group, blocks=group.old, old=None, home=group.blocks), own)


def _keep_slots(
    store: KVStore,
    seqs: Seq[Sequence],
    group: KVGroup,
    kept: Tensor,
    count: Tensor,
    prefixes: PrefixCache | None,
) -> None:
    rows, size = torch.tensor([seq.row for seq in seqs]), store.block_size
    table = None
    if any(seq.shared for seq in seqs) and store.has_other_owners(rows, group):
        assert prefixes is not None, "cutting shared blocks would change another owner's tokens"
        table = _new_table(store, group, count, prefixes)
        if table is None:
            for seq in seqs:
                prefixes.withdraw(seq)
            assert not store.has_other_owners(rows, group), "another sequence has blocks that are to be cut"
    used = torch.arange(kept.shape[-1]) < count[..., None]
    lanes = group.lanes[None, :, None].expand_as(kept)[used]
    slot = torch.arange(kept.shape[-1]).expand_as(kept)[used]
    row = rows[:, None, None].expand_as(kept)[used]
    source = store.table[row, lanes, kept[used] // size].long(), kept[used] % size
    if table is None:
        where = store.table[row, lanes, slot // size]
    else:
        column = (torch.arange(kept.shape[-1]) // size).clamp(max=table.shape[-1] - 1)
        where = table.gather(-1, column.expand_as(kept))[used]
    try:
        move_slots(group.blocks, source, (where.long(), slot % size))
        if group.side is not None:  # which nobody else owns
            row = side_rows(seqs)[:, None, None].expand_as(kept)[used]
            beside = (store.table[row, lanes, place // size].long() for place in (kept[used], slot))
            move_slots(group.side, *zip(beside, (kept[used] % size, slot % size), strict=True))
    except BaseException:  # Ctrl-C too: new blocks that no table names would be lost
        if table is not None:
            group.blocks.arena.release(group.blocks, torch.unique(where))
        raise
    if table is None:
        store.shorten(seqs, group, count)
    else:
        store.shorten(seqs, group, torch.zeros_like(count), beside=count)
        store.tables.exchange(rows, group.lanes, table, count)
    for seq in seqs:
        seq.dense = False
        derive_moved(store, seq, group)


def _new_table(store: KVStore, group: KVGroup, count: Tensor, prefixes: PrefixCache) -> Tensor | None:
    """Return new blocks [R, H, C] for ``count`` [R, H] slots of each lane; None if there is no room for them."""
    columns = -(-count // store.block_size)
    number = int(columns.sum())
    granted = store.try_allocate([(group, number)])
    if granted is None and prefixes.reclaim(number * group.blocks.block_bytes, group.blocks.arena):
        granted = store.try_allocate([(group, number)])
    if granted is None:
        return None
    table = torch.zeros((*count.shape, max(1, int(columns.max()))), dtype=torch.int32)
    table[torch.arange(table.shape[-1]) < columns[..., None]] = granted[0][1]
    return table


def close_holes(store: KVStore, seq: Sequence) -> None:
    """Move the last token of each lane with a hole into it, so that many tokens can be appended."""
    row, size = seq.row, store.block_size
    if seq.dense or not (store.hole[row] >= 0).any():
        return
    seq.changed()
    before = store.columns_held(seq)
    for group in seq.layout.groups:
        holed = group.only(group.lanes[store.hole[row, group.lanes] >= 0])
        last, hole = store.length[row, holed.lanes] - 1, store.hole[row, holed.lanes]
        place = torch.arange(len(holed.lanes))
        move_tokens(store, seq, holed, *((place, slot // size, slot % size) for slot in (last, hole)))
        store.tables.close_holes(row, holed.lanes)
        derive_moved(store, seq, holed)
    store.release_columns(seq, store.columns_held(seq), before)
    store.shrink_side(seq)


def drop_passed_windows(store: KVStore, seq: Sequence) -> None:
    """Free the leading blocks that no later query of a sliding-window layer can see."""
    if not seq.dense:
        return
    for window, lanes in store.lanes.windows.items():
        passed = (seq.seen - window + 1 - seq.starts[window]) // store.block_size
        if passed <= 0:
            continue
        columns = store.no_columns()
        columns[lanes] = passed
        store.cut_front(seq, columns)
        seq.starts[window] += passed * store.block_size
        seq.changed()


def compact_windows(store: KVStore, seq: Sequence, due: Tensor, prefixes: PrefixCache | None = None) -> None:
    """Cut lanes of sliding-window layers to what a later query can see, where slots are in any order and no hole is.

    Waits until a lane holds a whole block too many, as `drop_passed_windows` does where slots are in order.

    Args:
        store: holds the tables.
        seq: a sequence that was cut.
        due: bool [lanes], which to look at.
        prefixes: the prefix cache, if there is one.
    """
    for group in seq.layout.groups:
        windows = store.lanes.window_of_lane
        full = due & (store.length[seq.row] >= windows + store.block_size)
        lanes = group.lanes[full[group.lanes]]
        if not len(lanes):
            continue
        windowed = group.only(lanes)
        slots = lane_slots(store, [seq], windowed)  # lanes with a window are never encoded
        visible = slots.live & (slots.positions > (seq.seen - windows[lanes]).to(slots.live.device)[:, None])
        kept = visible.cpu().logical_not().sort(dim=-1, stable=True).indices
        cut(store, [seq], windowed, kept, visible.sum(dim=-1).cpu(), prefixes=prefixes)
