"""The parts of a batch: chunks of prompts, and groups of decode steps whose strategies are of one kind.

Shapes: T packed tokens, R sequences of a group, C table columns.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kvatlas.core.views import Selection
from kvatlas.engine.request import Request
from kvatlas.engine.staging import Visitors
from kvatlas.storage.sequence import Sequence, Slots
from kvatlas.storage.store import KVStore, side_rows
from kvatlas.strategies.plan import Plan


@dataclass(frozen=True, kw_only=True)
class OldBlocks:
    """Encoded blocks of the sequences of a segment, before their own: ``table`` [.., lanes, C], ``length`` [.., lanes].

    ``host_length`` is the length on the CPU; ``side`` the table of what lies beside, or None.
    """

    table: Tensor
    side: Tensor | None
    length: Tensor
    host_length: Tensor


class ChunkLayer(NamedTuple):
    """What one layer reads of a chunk's past: the table [H, C], lengths [H], these also on the CPU."""

    table: Tensor
    length: Tensor
    host_length: Tensor


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next ``count`` prompt tokens of one request, at row ``start`` of the batch.

    ``table`` [lanes, C] covers the chunk too, and so does ``side``, the table of what lies beside; ``past_length``
    [lanes], on the CPU, is what was cached before it; ``dense_starts`` gives the position of
    slot 0, encoded ones counted, per window (0: no window) while slots are in position order, else None; ``visitors``
    are the past's blocks on the host, or None; ``old`` those of the past that are encoded. ``layers`` are tables and
    lengths of the past, cut by layers once for a step; ``places`` the positions in int32, as kernels compare them.
    """

    request: Request
    start: int
    count: int
    positions: Tensor
    table: Tensor
    side: Tensor | None
    past_length: Tensor
    slots: Slots
    dense_starts: dict[int, int] | None
    visitors: Visitors | None
    old: OldBlocks | None
    layers: list[ChunkLayer]
    places: Tensor


@dataclass(frozen=True, kw_only=True)
class ChunkBatch:
    """Chunks of one layout that follow each other, n rows from ``start`` on; their new tokens are written together.

    ``block`` and ``offset`` are where these go, layer by layer, [n, H].
    """

    chunks: list[Chunk]
    start: int
    count: int
    block: list[Tensor]
    offset: list[Tensor]


class GroupLayer(NamedTuple):
    """What one layer of a decode group reads and writes: the tables [R, H, C], the others [R, H]; see `DecodeGroup`.

    ``side`` and ``beside`` are the table of what lies beside, and the new tokens' blocks there.
    """

    table: Tensor
    length: Tensor
    host_length: Tensor
    slot: Tensor
    block: Tensor
    offset: Tensor
    side: Tensor | None = None
    beside: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """One new token for each of R requests of one kind of strategy, from row ``start`` of the batch on.

    ``plan`` is the first one's; the others differ in budgets at most.

    ``layers`` are tables, lengths (the new tokens included) and the new slots, cut by layers once for a step;
    ``host_length`` [R, lanes] is all lengths, on the CPU. ``visitors`` are the blocks on the host, or None; ``old``
    those that are encoded, or None; ``slots`` are the new tokens'; ``choices`` says, layer by layer, which of the
    visitors' slots are read where not all are. ``shared`` and ``held`` are what layers with equal lanes compute once.
    """

    plan: Plan
    requests: list[Request]
    start: int
    positions: Tensor
    columns: list[int]
    dense: bool
    host_length: Tensor
    visitors: Visitors | None
    old: OldBlocks | None
    layers: list[GroupLayer]
    slots: Slots
    choices: dict[int, Selection] = field(default_factory=dict)
    shared: dict[object, dict[str, Tensor | None]] = field(default_factory=dict)
    held: dict[object, Tensor] = field(default_factory=dict)

    @property
    def seqs(self) -> list[Sequence]:
        """The sequences, in order of their rows."""
        return [sequence_of(request) for request in self.requests]


def _visitors(
    store: KVStore, plan: Plan, seqs: Seq[Sequence], length: Tensor, newest: Tensor | None = None
) -> Visitors | None:
    return Visitors(store, plan, seqs, length, newest) if plan.cache.host_layers else None


def make_chunk(store: KVStore, request: Request, count: int, start: int) -> Chunk:
    """Take slots for the next ``count`` prompt tokens; room for them must have been allocated."""
    seq = request.seq
    assert seq is not None
    device = store.arena.device
    past_length = store.length[seq.row].clone()
    old = _old_blocks(store, [seq])
    dense_starts = {0: 0, **seq.starts} if seq.dense else None
    slots = _on_device(store.append(seq, count), device)
    columns = int(store.columns_held(seq).max())
    table = store.table[seq.row, :, :columns].to(device)
    cut = (table, past_length.to(device), past_length)
    positions = torch.arange(seq.seen - count, seq.seen, device=device)
    return Chunk(
        request=request,
        start=start,
        count=count,
        positions=positions,
        places=positions.int(),
        layers=[ChunkLayer(*parts) for parts in zip(*(store.lanes.split(each, 0) for each in cut), strict=True)],
        table=table,
        side=None if seq.side is None else store.table[seq.side.row, :, :columns].to(device),
        past_length=past_length,
        slots=slots,
        dense_starts=dense_starts,
        visitors=_visitors(store, request.plan, [seq], past_length[None]),
        old=old,
    )


def batch_chunks(store: KVStore, chunks: Seq[Chunk]) -> list[ChunkBatch]:
    """Return chunks in runs of one layout; those of one should follow each other."""
    found = []
    for _, members in groupby(chunks, key=lambda chunk: id(sequence_of(chunk.request).layout)):
        run = list(members)
        block, offset = (
            torch.cat([getattr(chunk.slots, name) for chunk in run]) if len(run) > 1 else getattr(run[0].slots, name)
            for name in ("block", "offset")
        )
        found.append(
            ChunkBatch(
                chunks=run, start=run[0].start, count=sum(chunk.count for chunk in run),
                block=store.lanes.split(block), offset=store.lanes.split(offset.to(block.device)),
            )
        )  # fmt: skip
    return found


def make_group(store: KVStore, requests: list[Request], start: int) -> DecodeGroup:
    """Take a slot for the next token of each request; all their strategies are of one kind."""
    seqs = [sequence_of(request) for request in requests]
    device, plan = store.arena.device, requests[0].plan
    slots = _on_device(store.append_step(seqs), device)
    rows = torch.tensor([seq.row for seq in seqs])
    length = store.length[rows]
    per_lane = (-(-length.amax(dim=0) // store.block_size)).tolist()
    columns = [max(per_lane[lanes]) for lanes in store.lanes.slices]
    old = _old_blocks(store, seqs)
    table = store.table[rows, :, : max(columns)].to(device)
    cut = [table, length.to(device), length, slots.index, slots.block, slots.offset]
    if slots.side is not None:
        cut += [store.table[side_rows(seqs), :, : max(columns)].to(device), slots.side]
    return DecodeGroup(
        plan=plan,
        requests=requests,
        start=start,
        positions=torch.tensor([seq.seen - 1 for seq in seqs], device=device),
        host_length=length,
        columns=columns,
        slots=slots,
        layers=[GroupLayer(*parts) for parts in zip(*map(store.lanes.split, cut), strict=True)],
        dense=all(seq.dense for seq in seqs) or (old is None and _alike(store, length)),
        visitors=_visitors(store, plan, seqs, length, slots.index),
        old=old,
    )


def _old_blocks(store: KVStore, seqs: Seq[Sequence]) -> OldBlocks | None:
    """Return the encoded blocks of sequences of one layout; None if there are none."""
    rows = torch.tensor([seq.encoded.row for seq in seqs if seq.encoded is not None], dtype=torch.int64)
    length = store.length[rows]
    most = -(-int(length.max()) // store.block_size) if len(rows) else 0
    if not most:
        return None
    device = store.arena.device
    beside = side_rows([seq.encoded for seq in seqs if seq.encoded is not None])
    return OldBlocks(
        table=store.table[rows, :, :most].to(device),
        side=store.table[beside, :, :most].to(device) if len(beside) else None,
        length=length.to(device),
        host_length=length,
    )


def _alike(store: KVStore, length: Tensor) -> bool:
    """Whether all lanes of each sequence are equally long, and no window asks for positions."""
    return not store.lanes.windows and bool((length == length[:, :1]).all())


def sequence_of(request: Request) -> Sequence:
    """Return the sequence of a running request."""
    assert request.seq is not None
    return request.seq


def _on_device(slots: Slots, device: torch.device) -> Slots:
    side = None if slots.side is None else slots.side.to(device)
    return Slots(index=slots.index, block=slots.block.to(device), offset=slots.offset.to(device), side=side)
