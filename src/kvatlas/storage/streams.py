"""Streams that are made from keys and values: written with each token, made anew where tokens were moved.

What a stream says of several slots together may speak of tokens that are gone, after one was evicted and its slot
reused; it never leaves out one that is there, as it was written: blocks that are packed afterwards read a little
differently until they are merged. Shapes: n tokens, m blocks, s slots of a block, e of an entry, H lanes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from kvatlas.core.plan import Deriver
from kvatlas.core.streams import Stream
from kvatlas.core.views import TokenView
from kvatlas.kernels.blocks import read_keys, read_values
from kvatlas.storage.arena import BlockClass, SideClass

_TOKENS_AT_ONCE = 16384
Derived = Seq[tuple[Stream, Deriver]]


def of_several(derived: Derived, side: SideClass | None) -> Derived:
    """Return those streams whose entries are of several slots together."""
    return [] if side is None else [each for each in derived if side.layout.every(each[0].name) > 1]


def derive_tokens(
    side: SideClass, derived: Derived, block: Tensor, offset: Tensor, fresh: Tensor, view: TokenView
) -> None:
    """Write the entries of new tokens, each in a block of its own.

    Args:
        side: class of the blocks beside.
        derived: which streams, and who makes them.
        block: [..] int64, ids of the blocks beside.
        offset: [..] int64, slots in these.
        fresh: [..] bool, whether a token stands behind all others of its lane.
        view: shows the tokens [R, H, 1, D].
    """
    for stream, by in derived:
        kept, every = side.pool.view(stream.name), side.layout.every(stream.name)
        entry, place = by.derive(stream.name, view).squeeze(-2).to(kept.dtype), offset // every
        if every > 1:
            first = fresh.to(kept.device) & (offset % every == 0).to(kept.device)
            entry = torch.where(first[..., None], entry, by.merge(stream.name, kept[block, place], entry))
        kept[block, place] = entry


def derive_run(side: SideClass, derived: Derived, table: Tensor, first: Tensor, view: TokenView) -> None:
    """Write the entries of tokens that follow each other in every lane.

    Args:
        side: class of the blocks beside.
        derived: which streams, and who makes them.
        table: [H, C] ids of the blocks beside.
        first: [H] int64, on the CPU, the slot of the first token of each lane.
        view: shows the tokens [H, n, D].
    """
    for stream, by in derived:
        kept, every = side.pool.view(stream.name), side.layout.every(stream.name)
        entries = by.derive(stream.name, view).to(kept.dtype)  # [H, n, w]
        slot = first[:, None] + torch.arange(entries.shape[1])
        if every == 1:
            kept[_places(kept, table, slot)] = entries
            continue
        start = first // every
        number = int((slot[:, -1] // every - start).max()) + 1
        place = (slot - (start * every)[:, None]).to(kept.device)
        grid = entries.new_zeros(len(entries), number * every, stream.width)
        grid.scatter_(1, place[..., None].expand_as(entries), entries)
        live = torch.zeros(grid.shape[:2], dtype=torch.bool, device=kept.device).scatter_(1, place, True)
        grid, live = grid.view(-1, every, stream.width), live.view(-1, every)
        index = start[:, None] + torch.arange(number)
        block, offset = (each.flatten() for each in _places(kept, table, index))
        begun = torch.zeros(len(entries), number, dtype=torch.bool)
        begun[:, 0] = first % every > 0
        some, begun = live.any(dim=1), begun.flatten().to(kept.device)
        merged = _merged(grid[some], live[some], stream, by)
        block, offset, begun = block[some], offset[some], begun[some]
        kept[block, offset] = torch.where(begun[:, None], by.merge(stream.name, kept[block, offset], merged), merged)


def _places(kept: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return block ids and places in these of the entries ``index`` [H, n] of lanes; behind a table's end, its last."""
    column = (index // kept.shape[1]).clamp(max=table.shape[1] - 1)
    return table.gather(1, column.to(table.device)).long(), (index % kept.shape[1]).to(kept.device)


def derive_blocks(
    side: SideClass, derived: Derived, side_ids: Tensor, home: BlockClass, home_ids: Tensor, used: Tensor
) -> None:
    """Make the entries of whole blocks anew.

    Args:
        side: class of the blocks beside.
        derived: which streams, and who makes them.
        side_ids: [m] ids of the blocks beside.
        home: class of the blocks of keys and values.
        home_ids: [m] ids of these.
        used: [m] int64, how many slots at the front of each are in use; blocks without any are left alone.
    """
    if not derived:
        return
    some = (used > 0).to(home_ids.device)
    side_ids, home_ids, used = (each[some.to(each.device)] for each in (side_ids, home_ids, used))
    at_once = max(1, _TOKENS_AT_ONCE // home.layout.block_size)
    for first in range(0, len(home_ids), at_once):
        part = slice(first, first + at_once)
        _derive_some(side, derived, side_ids[part], home, home_ids[part], used[part])


def _derive_some(
    side: SideClass, derived: Derived, side_ids: Tensor, home: BlockClass, home_ids: Tensor, used: Tensor
) -> None:
    ids, beside = home_ids.int().to(home.device)[:, None], side_ids.long().to(side.device)
    readers = {"keys": read_keys, "values": read_values}
    view = TokenView(read=lambda what: readers[what](home.pool, ids, torch.float32).to(side.device))
    live = torch.arange(home.layout.block_size) < used.cpu()[:, None]
    live &= home.positions[ids[:, 0].long()].cpu() >= 0
    for stream, by in derived:
        kept, every = side.pool.view(stream.name), side.layout.every(stream.name)
        entries = by.derive(stream.name, view).to(kept.dtype)  # [m, s, w]
        if every == 1:
            kept[beside] = entries
            continue
        several = live.to(entries.device).view(-1, every)
        merged, some = _merged(entries.view(-1, every, stream.width), several, stream, by), several.any(dim=1)
        place = torch.arange(kept.shape[1], device=kept.device).expand(len(beside), -1).flatten()[some]
        kept[beside.repeat_interleave(kept.shape[1])[some], place] = merged[some]


def _merged(entries: Tensor, live: Tensor, stream: Stream, by: Deriver) -> Tensor:
    """Return one entry [m, w] of all live ones of [m, e, w]; where none is, anything."""
    while entries.shape[1] > 1:
        half = entries.shape[1] // 2
        one, other, rest = entries[:, :half], entries[:, half : 2 * half], entries[:, 2 * half :]
        has_one, has_other = live[:, :half, None], live[:, half : 2 * half, None]
        both = torch.where(has_one & has_other, by.merge(stream.name, one, other), torch.where(has_one, one, other))
        entries = torch.cat([both, rest], dim=1)
        live = torch.cat([live[:, :half] | live[:, half : 2 * half], live[:, 2 * half :]], dim=1)
    return entries[:, 0]
