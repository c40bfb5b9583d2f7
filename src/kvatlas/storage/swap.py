"""Swap whole sequences to the host tier and back, bit for bit.

A preempted request whose cache a strategy has cut cannot be computed anew: another cache would come out. Its device
blocks are copied to the host and, when there is room again, to other blocks of the device. What lives on the host
anyway stays there; what it is read through holds nothing worth keeping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.storage.arena import LentBlocks
from kvatlas.storage.lanes import LaneGroup
from kvatlas.storage.link import BlockPairs, Link, carry_blocks
from kvatlas.storage.sequence import LaneRow, Sequence
from kvatlas.storage.store import KVStore
from kvatlas.storage.tables import RowState


@dataclass(frozen=True, kw_only=True)
class _ParkedRow:
    """One row of tables, taken out: how long its lanes are, and where its blocks wait, group by group."""

    row: LaneRow
    columns: Tensor
    state: RowState
    groups: list[LaneGroup]
    waiting: list[tuple[LentBlocks, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SwappedSequence:
    """A sequence without blocks on the device.

    Args:
        seq: what it was and will be again; it has no rows meanwhile.
        parked: its rows.
    """

    seq: Sequence
    parked: list[_ParkedRow]

    @property
    def host_bytes(self) -> int:
        """Bytes that its blocks take on the host."""
        return sum(len(ids) * blocks.block_bytes for row in self.parked for blocks, ids in row.waiting)


class Swapper:
    """Moves sequences between the tiers of a store.

    Args:
        store: with or without a host tier; without one, nothing is ever swapped.
        link: the way between the tiers.
    """

    def __init__(self, store: KVStore, link: Link) -> None:
        self._store = store
        self._link = link

    def try_swap_out(self, seq: Sequence) -> SwappedSequence | None:
        """Copy a sequence to the host and free its device blocks; None, and nothing changed, if there is no room."""
        store, host = self._store, self._store.host
        if host is None:
            return None
        store.release_reserved(seq)
        parked: list[_ParkedRow] = []
        pairs: BlockPairs = []
        for row in seq.rows:
            if row in seq.passing:
                continue
            columns = store.columns_held(row)
            found = store.ids_between(row, torch.zeros_like(columns), columns)
            waiting = []
            for group, ids in found:
                blocks, kept = group.blocks, group.blocks.arena is host
                target = blocks if kept else blocks.on(host)
                target_ids = ids if kept else host.try_allocate(target, len(ids))
                if target_ids is None:
                    for _, _, taken, taken_ids in pairs:
                        host.release(taken, taken_ids)
                    return None
                if not kept:
                    pairs.append((blocks, ids, target, target_ids))
                waiting.append((target, target_ids))
            state = store.tables.state(row.row)
            groups = [group for group, _ in found]
            parked.append(_ParkedRow(row=row, columns=columns, state=state, groups=groups, waiting=waiting))
        try:
            carry_blocks(self._link.stores, pairs)
        except BaseException:  # Ctrl-C arrives here if anywhere: what was taken must not be lost
            for _, _, taken, taken_ids in pairs:
                host.release(taken, taken_ids)
            raise
        for blocks, ids, _, _ in pairs:
            blocks.arena.release(blocks, ids)
        for row in seq.passing:
            store.release_columns(row, store.no_columns(), store.columns_held(row))
        seq.changed()
        for each in seq.rows:
            store.free_row(each)
        return SwappedSequence(seq=seq, parked=parked)

    def try_swap_in(self, swapped: SwappedSequence) -> Sequence | None:
        """Copy a sequence back and free its host blocks; None, and nothing changed, if the device has no room."""
        store, host, seq = self._store, self._store.host, swapped.seq
        assert host is not None
        missing = [
            (group, len(ids))
            for row in swapped.parked
            for group, (_, ids) in zip(row.groups, row.waiting, strict=True)
            if group.blocks.arena is not host
        ]
        granted = store.try_allocate(missing)
        if granted is None:
            return None
        pairs: BlockPairs = []
        entries: list[list[tuple[LaneGroup, Tensor]]] = []
        fresh = iter(granted)
        for row in swapped.parked:
            entries.append([])
            for group, (blocks, ids) in zip(row.groups, row.waiting, strict=True):
                new_ids = ids
                if group.blocks.arena is not host:
                    _, new_ids = next(fresh)
                    pairs.append((blocks, ids, group.blocks, new_ids))
                entries[-1].append((group, new_ids))
        try:
            carry_blocks(self._link.fetches, pairs)
        except BaseException:  # the sequence stays on the host, whole
            for group, new_ids in granted:
                group.blocks.arena.release(group.blocks, new_ids)
            raise
        for row, found in zip(swapped.parked, entries, strict=True):
            row.row.row = store.tables.take_row()
            store.put(row.row, row.columns, found)
            store.tables.restore(row.row.row, row.state)
        for passing in seq.passing:
            passing.row = store.tables.take_row()
        for blocks, ids, _, _ in pairs:
            host.release(blocks, ids)
        return seq

    def drop(self, swapped: SwappedSequence) -> None:
        """Forget a swapped sequence, for instance because its request was cancelled."""
        assert self._store.host is not None
        for row in swapped.parked:
            for blocks, ids in row.waiting:
                self._store.host.release(blocks, ids)
