"""What storage does when a strategy has answered: cut lanes to chosen slots, open holes, drop passed windows.

Shapes: R sequences, H lanes of one group or layer, S slots padded to the longest lane.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from kvatlas.core.views import LayerView
from kvatlas.storage.arena import BlockClass
from kvatlas.storage.lanes import LaneGroup
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore


def lane_view(store: KVStore, seqs: Seq[Sequence], group: LaneGroup, recent: Seq[int]) -> tuple[LayerView, Tensor]:
    """Return what a stage may see of ``group``'s lanes, and which slots are live [R, H, S] bool.

    A slot is live while it holds a token; it is ``valid`` in the view if a later query can still see that token
    through the layer's sliding window.
    """
    rows = torch.tensor([seq.row for seq in seqs])
    blocks, lanes, size = group.blocks, group.lanes, store.block_size
    length, hole = store.length[rows][:, lanes], store.hole[rows][:, lanes]
    columns = -(-int(length.max()) // size)
    table = store.table[rows[:, None], lanes[None, :], :columns]
    device = blocks.device
    flat, shape = table.flatten().to(device), (len(rows), len(lanes), columns * size)
    slot = torch.arange(columns * size)
    live = ((slot < length[..., None]) & (slot != hole[..., None])).to(device)
    positions = blocks.positions.index_select(0, flat).view(shape)
    sums = None if blocks.column_sums is None else blocks.column_sums.index_select(0, flat).view(shape)
    seen = torch.tensor([seq.seen for seq in seqs], device=device)
    oldest = seen[:, None] - store.lanes.window_of_lane[lanes].to(device)
    view = LayerView(
        positions_BHS=positions,
        valid_BHS=live & (positions > oldest[..., None]),
        seen_B=seen,
        recent_B=torch.tensor(recent, device=device),
        column_sums_BHS=sums,
    )
    return view, live


def open_holes(store: KVStore, seqs: Seq[Sequence], group: LaneGroup, victims: Tensor) -> None:
    """Evict slot ``victims`` [R, H] int64 of each lane (-1: none); the next token overwrites it in place."""
    rows = torch.tensor([seq.row for seq in seqs])
    store.hole[rows[:, None], group.lanes[None, :]] = victims.cpu()
    for seq in seqs:
        seq.dense = False


def close_holes(store: KVStore, seq: Sequence) -> None:
    """Move the last token of each lane with a hole into it, so that many tokens can be appended."""
    row, size = seq.row, store.block_size
    before = store.columns_held(seq)
    for group in seq.layout.groups:
        lanes = group.lanes[store.hole[row, group.lanes] >= 0]
        last = store.length[row, lanes] - 1
        source = _locate(store.table[row], lanes, last, size)
        target = _locate(store.table[row], lanes, store.hole[row, lanes], size)
        _copy_slots(group.blocks, source, target)
        store.length[row, lanes] = last
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
    _copy_slots(group.blocks, source, target)
    store.length[seq.row, group.lanes] = count
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
        view, _ = lane_view(store, [seq], windowed, [0])
        visible = view.valid_BHS[0].cpu()
        kept = visible.logical_not().sort(dim=-1, stable=True).indices
        keep_slots(store, seq, windowed, kept, visible.sum(dim=-1))


def _locate(table: Tensor, lanes: Tensor, slot: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return table[lanes, slot // block_size].long(), slot % block_size


def _copy_slots(blocks: BlockClass, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """Copy slots; reading everything before writing makes overlapping source and target safe."""
    device = blocks.device
    (from_block, from_offset), (to_block, to_offset) = (
        (block.to(device), offset.to(device)) for block, offset in (source, target)
    )
    for pool in (blocks.keys, blocks.values, blocks.positions, blocks.column_sums):
        if pool is not None:
            pool[to_block, to_offset] = pool[from_block, from_offset]


def _trim(store: KVStore, seq: Sequence, before: Tensor) -> None:
    """Free blocks behind the lengths; ``before`` [lanes] is how many each lane held."""
    store.release_columns(seq, store.columns_held(seq), before)
