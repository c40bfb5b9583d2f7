"""What storage does when a strategy has answered: cut lanes to chosen slots, open holes, drop passed windows.

Shapes: R sequences, H lanes of one group or layer, S slots padded to the longest lane.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvatlas.core.views import LayerView
from kvatlas.storage.bounds import bound_blocks
from kvatlas.storage.encoding import empty_slots, move_slots
from kvatlas.storage.lanes import LaneGroup
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore


@dataclass(frozen=True, kw_only=True)
class LaneSlots:
    """The slots of some lanes, encoded blocks first, then the sequence's own.

    Args:
        view: what a stage may see.
        live_BHS: which slots hold a token; the view's ``valid`` ones a later query can still see through the window.
        num_old: S of the encoded blocks.
    """

    view: LayerView
    live_BHS: Tensor
    num_old: int


def lane_view(store: KVStore, seqs: Seq[Sequence], group: LaneGroup, recent: Seq[int]) -> LaneSlots:
    """Return the slots of ``group``'s lanes; all sequences have one layout."""
    parts = [_read(store, [seq.row for seq in seqs], group)]
    old, encoded = seqs[0].layout.old_of(group.blocks), [seq.encoded for seq in seqs]
    if old is not None:
        rows = [row.row for row in encoded if row is not None]
        parts.insert(0, _read(store, rows, LaneGroup(blocks=old, lanes=group.lanes)))
    positions = torch.cat([part.positions for part in parts], dim=-1)
    live = torch.cat([part.live for part in parts], dim=-1)
    sums = [part.sums for part in parts if part.sums is not None]
    seen = torch.tensor([seq.seen for seq in seqs], device=positions.device)
    oldest = seen[:, None] - store.lanes.window_of_lane[group.lanes].to(positions.device)
    view = LayerView(
        positions_BHS=positions,
        valid_BHS=live & (positions > oldest[..., None]),
        seen_B=seen,
        recent_B=torch.tensor(recent, device=positions.device),
        column_sums_BHS=torch.cat(sums, dim=-1) if sums else None,
    )
    return LaneSlots(view=view, live_BHS=live, num_old=0 if old is None else parts[0].live.shape[-1])


class _Slots(NamedTuple):
    positions: Tensor
    live: Tensor
    sums: Tensor | None


def _read(store: KVStore, rows: Seq[int], group: LaneGroup) -> _Slots:
    """Return positions, liveness and column sums [R, H, S] of the slots in some rows of the tables."""
    row, lanes, size, blocks = torch.tensor(rows), group.lanes, store.block_size, group.blocks
    length, hole = store.length[row][:, lanes], store.hole[row][:, lanes]
    columns = -(-int(length.max()) // size)
    table = store.table[row[:, None], lanes[None, :], :columns]
    flat, shape = table.flatten().to(blocks.device), (len(rows), len(lanes), columns * size)
    slot = torch.arange(columns * size)
    positions = blocks.positions.index_select(0, flat).view(shape)
    sums = None if blocks.column_sums is None else blocks.column_sums.index_select(0, flat).view(shape)
    live = ((slot < length[..., None]) & (slot != hole[..., None])).to(blocks.device) & (positions >= 0)
    return _Slots(positions, live, sums)


def evict_one(store: KVStore, seqs: Seq[Sequence], group: LaneGroup, victims: Tensor, num_old: int) -> None:
    """Evict slot ``victims`` [R, H] int64 of each lane (-1: none), numbered as `lane_view` does.

    A slot of the sequence's own is a hole, which the next token overwrites; one of an encoded block stays empty.
    """
    rows, victims = torch.tensor([seq.row for seq in seqs]), victims.cpu()
    store.hole[rows[:, None], group.lanes[None, :]] = (victims - num_old).clamp(min=-1)
    for seq in seqs:
        seq.dense = False
    if num_old:
        emptied = torch.arange(num_old) == victims[..., None]
        for seq, slots in zip(seqs, emptied, strict=True):
            _empty(store, seq, group, slots)


def keep_only(store: KVStore, seq: Sequence, group: LaneGroup, kept: Tensor, count: Tensor, num_old: int) -> None:
    """Cut each lane to the slots ``kept`` [H, n] int64, ascending, numbered as `lane_view` does; see `keep_slots`."""
    used = torch.arange(kept.shape[1]) < count[:, None]
    if num_old:
        old = used & (kept < num_old)
        emptied = torch.ones(len(kept), num_old, dtype=torch.bool)
        lane = torch.arange(len(kept))[:, None].expand_as(kept)
        emptied[lane[old], kept[old]] = False
        _empty(store, seq, group, emptied)
        order = (used & ~old).logical_not().int().sort(dim=1, stable=True).indices
        kept, count = kept.gather(1, order) - num_old, (used & ~old).sum(dim=1)
    keep_slots(store, seq, group, kept, count)


def _empty(store: KVStore, seq: Sequence, group: LaneGroup, emptied: Tensor) -> None:
    """Forget tokens of encoded blocks; ``emptied`` [H, S] may name slots behind a lane's end."""
    old = seq.layout.old_of(group.blocks)
    assert old is not None and seq.encoded is not None
    length = store.length[seq.encoded.row, group.lanes]
    own = emptied & (torch.arange(emptied.shape[1]) < length[:, None])
    empty_slots(store, seq, LaneGroup(blocks=old, lanes=group.lanes), own)


def close_holes(store: KVStore, seq: Sequence) -> None:
    """Move the last token of each lane with a hole into it, so that many tokens can be appended."""
    row, size = seq.row, store.block_size
    before = store.columns_held(seq)
    for group in seq.layout.groups:
        lanes = group.lanes[store.hole[row, group.lanes] >= 0]
        last = store.length[row, lanes] - 1
        source = _locate(store.table[row], lanes, last, size)
        target = _locate(store.table[row], lanes, store.hole[row, lanes], size)
        move_slots(group.blocks, source, target)
        store.length[row, lanes] = last
        _bound_anew(store, seq, LaneGroup(blocks=group.blocks, lanes=lanes))
    store.hole[row] = -1
    _trim(store, seq, before)


def keep_slots(store: KVStore, seq: Sequence, group: LaneGroup, kept: Tensor, count: Tensor) -> None:
    """Cut each lane of ``group`` to the slots ``kept`` [H, n] int64, ascending, and free the blocks behind.

    Only the first ``count`` [H] int64 entries of each lane are used. The caller owns all blocks alone.
    """
    assert not seq.shared, "cutting shared blocks would change another owner's tokens"
    before = store.columns_held(seq)
    used = torch.arange(kept.shape[1]) < count[:, None]
    lanes = group.lanes[:, None].expand_as(kept)[used]
    slot = torch.arange(kept.shape[1]).expand_as(kept)[used]
    source = _locate(store.table[seq.row], lanes, kept[used], store.block_size)
    target = _locate(store.table[seq.row], lanes, slot, store.block_size)
    move_slots(group.blocks, source, target)
    store.length[seq.row, group.lanes] = count
    _bound_anew(store, seq, group)
    seq.dense = False
    _trim(store, seq, before)


def drop_passed_windows(store: KVStore, seq: Sequence) -> None:
    """Free the leading blocks that no later query of a sliding-window layer can see."""
    if not seq.dense:
        return
    for window, lanes in store.lanes.windows.items():
        passed = (seq.seen - window + 1 - seq.starts[window]) // store.block_size
        if passed <= 0:
            continue
        low = torch.zeros(store.lanes.count, dtype=torch.int64)
        high = low.clone()
        high[lanes] = passed
        store.release_columns(seq, low, high)
        store.table[seq.row, lanes] = store.table[seq.row, lanes].roll(-passed, dims=1)
        store.length[seq.row, lanes] -= passed * store.block_size
        seq.starts[window] += passed * store.block_size


def compact_windows(store: KVStore, seq: Sequence) -> None:
    """Cut lanes of sliding-window layers to what a later query can see, where slots are in any order and no hole is.

    Waits until a lane holds a whole block too many, as `drop_passed_windows` does where slots are in order.
    """
    for group in seq.layout.groups:
        windows = store.lanes.window_of_lane[group.lanes]
        lanes = group.lanes[store.length[seq.row, group.lanes] >= windows + store.block_size]
        if not len(lanes):
            continue
        windowed = LaneGroup(blocks=group.blocks, lanes=lanes)
        slots = lane_view(store, [seq], windowed, [0])
        visible = slots.view.valid_BHS[0, :, slots.num_old :].cpu()  # lanes with a window are never encoded
        kept = visible.logical_not().sort(dim=-1, stable=True).indices
        keep_slots(store, seq, windowed, kept, visible.sum(dim=-1))


def _locate(table: Tensor, lanes: Tensor, slot: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return table[lanes, slot // block_size].long(), slot % block_size


def _bound_anew(store: KVStore, seq: Sequence, group: LaneGroup) -> None:
    """Make the key bounds of lanes whose keys were moved."""
    if group.blocks.pool.key_bounds is None or not len(group.lanes):
        return
    length, size = store.length[seq.row, group.lanes], store.block_size
    first = torch.arange(-(-int(length.max()) // size)) * size
    used = (length[:, None] - first).clamp(min=0, max=size)
    bound_blocks(group.blocks, store.table[seq.row, group.lanes, : len(first)], used)


def _trim(store: KVStore, seq: Sequence, before: Tensor) -> None:
    """Free blocks behind the lengths; ``before`` [lanes] is how many each lane held."""
    store.release_columns(seq, store.columns_held(seq), before)
