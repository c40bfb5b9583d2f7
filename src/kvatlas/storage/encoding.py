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
from kvatlas.storage.arena import BlockClass
from kvatlas.storage.lanes import LaneGroup
from kvatlas.storage.sequence import Sequence

if TYPE_CHECKING:
    from kvatlas.storage.store import KVStore

EMPTY = -1
"""Position of a slot without a token."""


def encode_front(store: KVStore, seq: Sequence, columns: Tensor, granted: Seq[tuple[LaneGroup, Tensor]]) -> None:
    """Encode the first ``columns`` [lanes] int64 blocks of each lane, its oldest tokens, and free them.

    Args:
        store: holds the tables.
        seq: a sequence with an encoded row; no lane to encode has a hole.
        columns: whole blocks of each lane.
        granted: new blocks [n] int32 for every group of the encoded row, lane after lane.
    """
    assert seq.encoded is not None
    if not seq.dense:
        _sort_by_position(store, seq, columns > 0)
    for group, new in granted:
        home = group.home
        assert home is not None
        old = store.tables.ids_between(seq.row, group.lanes, torch.zeros_like(columns), columns)[:, None]
        keys, values = read_keys(home.pool, old, torch.float32), read_values(home.pool, old, torch.float32)
        encode_blocks(group.blocks.pool, new.long().to(home.device), keys, values)
        source, target = old[:, 0].long().to(home.device), new.long().to(home.device)
        for pool, filled in _sidecars(home, group.blocks):
            filled[target] = pool[source]
    store.put(seq.encoded, columns, list(granted))
    store.tables.append_columns(seq.encoded.row, columns)
    store.cut_front(seq, columns)


def empty_slots(store: KVStore, seq: Sequence, group: LaneGroup, emptied: Tensor) -> None:
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


def _merge_pairs(store: KVStore, seq: Sequence, group: LaneGroup) -> bool:
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
        first, second = table[pair].view(-1, 2).unbind(dim=1)
        _merge(blocks, first.long().to(blocks.device), second.long().to(blocks.device))
    blocks.arena.release(blocks, table[gone])
    store.tables.take_out(row, group.lanes, gone)
    return True


def _merge(blocks: BlockClass, first: Tensor, second: Tensor) -> None:
    """Encode the tokens of ``first`` and ``second`` [n] anew, all in ``first``; they are at most s together."""
    both = torch.stack([first, second], dim=1)
    size = blocks.layout.block_size
    positions = blocks.positions[both].flatten(1)
    order = (positions < 0).int().sort(dim=1, stable=True).indices[:, :size]
    taken = positions.gather(1, order)
    # An empty slot repeats a token, so that it stretches no group of scales.
    source = torch.where(taken >= 0, order, order[:, :1])
    keys, values = (read(blocks.pool, both, torch.float32) for read in (read_keys, read_values))
    rows = torch.arange(len(first), device=first.device)[:, None]
    encode_blocks(blocks.pool, first, keys[rows, source], values[rows, source])
    if blocks.column_sums is not None:
        blocks.column_sums[first] = blocks.column_sums[both].flatten(1).gather(1, order)
    blocks.positions[first] = taken


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
        source = table[rows, order // size][used].to(blocks.device), (order % size)[used].to(blocks.device)
        target = (
            table[rows, slot.expand_as(order) // size][used].to(blocks.device),
            (slot % size).expand_as(order)[used].to(blocks.device),
        )
        move_slots(blocks, source, target)


def move_slots(blocks: BlockClass, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """Copy tokens with their sidecars between slots (block [n], offset [n]); all are read before any is written."""
    copy_slots(blocks.pool, source, target)
    for sidecar in (blocks.positions, blocks.column_sums):
        if sidecar is not None:
            sidecar[target] = sidecar[source]


def _sidecars(source: BlockClass, target: BlockClass) -> list[tuple[Tensor, Tensor]]:
    pairs = [(source.positions, target.positions)]
    if source.column_sums is not None and target.column_sums is not None:
        pairs.append((source.column_sums, target.column_sums))
    return pairs
