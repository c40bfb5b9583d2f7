"""Old tokens in packed blocks: encode full blocks, empty single slots of them, merge those that are half empty.

A packed block is written whole. So a token waits in its sequence's own row until it is old, and then moves with 31
others into the encoded row; what is evicted from there leaves an empty slot, whose position is -1. Two blocks of a
lane that are half empty become one, so that all but one of a lane are more than half full.
Shapes: H lanes of one group, C table columns, s slots of a block, n blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvatlas.kernels.blocks import copy_slots, encode_blocks, read_keys, read_values
from kvatlas.storage.arena import BlockClass, SideClass, loose_blocks
from kvatlas.storage.lanes import KVGroup
from kvatlas.storage.link import BlockPairs, carry_blocks
from kvatlas.storage.sequence import KVRow, Sequence
from kvatlas.storage.streams import derive_blocks, of_several

if TYPE_CHECKING:
    from kvatlas.storage.store import KVStore

EMPTY = -1
"""Position of a slot without a token."""


def encode_front(store: KVStore, seq: Sequence, columns: Tensor, granted: Seq[tuple[KVGroup, Tensor]]) -> None:
    """Encode the first ``columns`` [lanes] int64 blocks of each lane, its oldest tokens, and free them.

    What lies beside them stays where it is and goes with them.

    Args:
        store: holds the tables.
        seq: a sequence with an encoded row; no lane to encode has a hole.
        columns: whole blocks of each lane.
        granted: new blocks [n] int32 for every group of the encoded row, lane after lane.
    """
    assert seq.encoded is not None
    if not seq.dense:
        _sort_by_position(store, seq, columns > 0)
    crossing: BlockPairs = []
    try:
        for group, new in granted:
            home = group.home
            assert home is not None
            ids = store.tables.ids_between(seq.row, group.lanes, torch.zeros_like(columns), columns)
            target, target_ids = group.blocks, new
            if group.blocks.arena is not store.arena:  # encoded where it is, so that few bytes cross
                target, target_ids = loose_blocks(group.blocks, len(new), home)
                crossing.append((target, target_ids, group.blocks, new))
            _encode(home, ids, target, target_ids)
        carry_blocks(store.link.stores, crossing)
    except BaseException:  # Ctrl-C too: the new blocks are nobody's yet
        for group, new in granted:
            group.blocks.arena.release(group.blocks, new)
        raise
    store.put(seq.encoded, columns, granted)
    store.tables.append_columns(seq.encoded.row, columns)
    if seq.side is not None and seq.encoded.side is not None:
        row, beside = seq.encoded.side, columns * store.has_lanes(seq.encoded.side)
        store.put(row, beside, store.ids_between(seq.side, torch.zeros_like(columns), beside))
        store.tables.append_columns(row.row, beside)
    store.cut_front(seq, columns, keep_side=True)


def _encode(home: BlockClass, ids: Tensor, target: BlockClass, target_ids: Tensor) -> None:
    """Write the tokens of whole blocks [n] into blocks [n] of another class on the same device."""
    table, source, to = ids[:, None].to(home.device), ids.long().to(home.device), target_ids.long().to(home.device)
    keys, values = read_keys(home.pool, table, torch.float32), read_values(home.pool, table, torch.float32)
    encode_blocks(target.pool, to, keys, values)
    target.positions[to] = home.positions[source]


def empty_slots(store: KVStore, seq: Sequence, group: KVGroup, emptied: Tensor) -> None:
    """Forget tokens in encoded blocks, and merge blocks that are half empty then.

    Args:
        store: holds the tables.
        seq: a sequence with an encoded row.
        group: lanes of one class of the encoded row.
        emptied: bool [H, C * s], which slots lose their token; those that have none may be named again.
    """
    if seq.encoded is None or not emptied.any():
        return
    blocks, size = group.blocks, store.block_size
    lane, slot = emptied.cpu().nonzero(as_tuple=True)
    ids = store.table[seq.encoded.row, group.lanes[lane], slot // size].long().to(blocks.device)
    blocks.positions[ids, (slot % size).to(blocks.device)] = EMPTY
    seq.dense = False
    while _merge_pairs(store, seq, group):
        pass


def _merge_pairs(store: KVStore, seq: Sequence, group: KVGroup) -> bool:
    """In each lane free empty blocks and make one block of the first two half-empty ones; False: nothing to do."""
    assert seq.encoded is not None
    row, size = seq.encoded.row, store.block_size
    held = store.columns_held(seq.encoded)[group.lanes]
    most = int(held.max())
    table = store.table[row, group.lanes, :most]
    blocks = group.blocks
    full = (blocks.positions[table.long().to(blocks.device)] >= 0).sum(dim=-1).cpu()  # tokens [H, C]
    own = torch.arange(most) < held[:, None]
    half = own & (full <= size // 2)
    pair = half & (half.cumsum(dim=1) <= 2) & (half.sum(dim=1, keepdim=True) >= 2)
    gone = pair & (pair.cumsum(dim=1) == 2) | (own & (full == 0) & ~pair)
    if not gone.any():
        return False
    merged = pair.any(dim=1)
    if merged.any():
        order = _merge(blocks, table[pair].view(-1, 2).long().to(blocks.device))
    blocks.arena.release(blocks, table[gone])
    store.tables.take_out(row, group.lanes, gone)
    side, beside = group.side, seq.encoded.side
    if side is not None and beside is not None:
        table_beside = store.table[beside.row, group.lanes, :most]
        if merged.any():
            both = table_beside[pair].view(-1, 2).long().to(side.device)
            side.gather(both, order.to(side.device))
            full = torch.full((len(both),), size)
            derive_blocks(
                side, of_several(group.derived, side), both[:, 0], blocks, table[pair].view(-1, 2)[:, 0], full
            )
        side.arena.release(side, table_beside[gone])
        store.tables.take_out(beside.row, group.lanes, gone)
    return True


def _merge(blocks: BlockClass, both: Tensor) -> Tensor:
    """Encode the tokens of two blocks [n, 2] anew, all in the first; they are at most s together.

    Returns which slots [n, s] of the two they come from.
    """
    first = both[:, 0]
    size = blocks.layout.block_size
    positions = blocks.positions[both].flatten(1)
    order = (positions < 0).int().sort(dim=1, stable=True).indices[:, :size]
    taken = positions.gather(1, order)
    # An empty slot repeats a token, so that it stretches no group of scales.
    source = torch.where(taken >= 0, order, order[:, :1])
    keys, values = (read(blocks.pool, both, torch.float32) for read in (read_keys, read_values))
    rows = torch.arange(len(first), device=first.device)[:, None]
    encode_blocks(blocks.pool, first, keys[rows, source], values[rows, source])
    blocks.positions[first] = taken
    return order


def _sort_by_position(store: KVStore, seq: Sequence, lanes_due: Tensor) -> None:
    """Bring the slots of some lanes into order of position, so that the oldest tokens come first."""
    size = store.block_size
    for group in seq.layout.groups:
        lanes = group.lanes[lanes_due[group.lanes]]
        if not len(lanes):
            continue
        blocks, length = group.blocks, store.length[seq.row, lanes]
        most = int(length.max())
        table = store.table[seq.row, lanes, : -(-most // size)].long()
        slot = torch.arange(most)
        used = slot < length[:, None]
        positions = blocks.positions[table.to(blocks.device)].flatten(1)[:, :most].cpu()
        order = positions.masked_fill(~used, torch.iinfo(torch.int32).max).argsort(dim=1, stable=True)
        rows = torch.arange(len(lanes))[:, None].expand_as(order)
        source, target = (order // size, order % size), (slot.expand_as(order) // size, (slot % size).expand_as(order))
        due = group.only(lanes)
        move_tokens(store, seq, due, *((rows[used], *(x[used] for x in end)) for end in (source, target)))
        derive_moved(store, seq, due)


def move_tokens(
    store: KVStore, row: KVRow, group: KVGroup, source: tuple[Tensor, ...], target: tuple[Tensor, ...]
) -> None:
    """Copy tokens of a row, and what lies beside them, from slots to slots; all are read before any is written.

    Args:
        store: holds the tables.
        row: whose lanes.
        group: which lanes.
        source: of each token [n] int64 the place of its lane in the group, its column and its offset.
        target: likewise.
    """
    for each, blocks in zip(row.with_side, (group.blocks, group.side), strict=False):
        if blocks is None:
            continue
        ends = []
        for lane, column, offset in (source, target):
            ids = store.table[each.row, group.lanes[lane], column]
            ends.append((ids.long().to(blocks.device), offset.to(blocks.device)))
        move_slots(blocks, *ends)


def move_slots(blocks: BlockClass | SideClass, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """Copy tokens, or what lies beside them, between slots (block [n], offset [n]); all are read first."""
    if isinstance(blocks, SideClass):
        blocks.move(source, target)
        return
    copy_slots(blocks.pool, source, target)
    blocks.positions[target] = blocks.positions[source]


def derive_moved(store: KVStore, row: KVRow, group: KVGroup) -> None:
    """Make anew what streams say of several slots together of a row's lanes, because tokens of theirs were moved."""
    derived = of_several(group.derived, group.side)
    if not derived or not len(group.lanes):
        return
    assert group.side is not None and row.side is not None
    length, size = store.length[row.row, group.lanes], store.block_size
    first = torch.arange(-(-int(length.max()) // size)) * size
    used = (length[:, None] - first).clamp(min=0, max=size)
    home, beside = (store.table[each.row, group.lanes, : len(first)].flatten() for each in row.with_side)
    derive_blocks(group.side, derived, beside, group.blocks, home, used.flatten())
