"""One forward over a packed batch: where each token's keys and values go, and what each query reads.

A step's batch is a row of *segments*: chunks of prompts first, then groups of decode steps that share a strategy.
Attention of a chunk runs per sequence; a decode group is one call over all its sequences and heads.

Shapes: T packed tokens, n tokens of a chunk, R sequences of a group, H KV heads, C table columns.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from kvatlas.core.vocabulary import Need
from kvatlas.engine.request import Request
from kvatlas.kernels.chunk_attention import chunk_attention
from kvatlas.kernels.column_sums import column_sums
from kvatlas.kernels.decode_attention import decode_attention
from kvatlas.kernels.visibility import slot_mask
from kvatlas.models.adapter import AttentionCall
from kvatlas.storage.arena import BlockClass
from kvatlas.storage.store import KVStore, Sequence, Slots
from kvatlas.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next ``count`` prompt tokens of one request, at row ``start`` of the batch.

    ``table`` [lanes, C] covers the chunk too; ``past_length`` [lanes], on the CPU, is what was
    cached before it; ``dense_starts`` gives the
    position of slot 0 per window (0: no window) while slots are in position order, else None.
    """

    request: Request
    start: int
    count: int
    positions: Tensor
    table: Tensor
    past_length: Tensor
    slots: Slots
    dense_starts: dict[int, int] | None


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """One new token for each of R requests of one strategy, from row ``start`` of the batch on.

    ``table`` [R, lanes, C] and ``length`` [R, lanes] include the new tokens; ``host_length`` is the latter on the CPU.
    """

    strategy: Strategy
    requests: list[Request]
    start: int
    positions: Tensor
    table: Tensor
    length: Tensor
    columns: list[int]
    slots: Slots
    dense: bool
    host_length: Tensor
    masks: dict[object, Tensor | None] = field(default_factory=dict)
    held: dict[object, Tensor] = field(default_factory=dict)


class _Limits(TypedDict):
    """Arguments that attention and its column sums must share."""

    scale: float
    softcap: float | None
    window: int | None
    reach: tuple[int, int] | None
    dense_start: int | None


class ForwardPass:
    """Answers a model's attention calls for one batch; made anew for each forward.

    Args:
        store: where keys and values lie.
        chunks: prompt chunks, in order of their rows.
        groups: decode groups, in order of their rows.
    """

    def __init__(self, store: KVStore, chunks: Seq[Chunk], groups: Seq[DecodeGroup]) -> None:
        self._store = store
        self._chunks = chunks
        self._groups = groups

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write this layer's keys and values to their slots and return what the queries read [1, T, Hq, Dv]."""
        q_THD, k_THD, v_THD = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        out = q_THD.new_empty((q_THD.shape[0], q_THD.shape[1], v_THD.shape[2]))
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.start + chunk.count)
            out[rows] = self._attend_chunk(call, chunk, q_THD[rows], k_THD[rows], v_THD[rows])
        for group in self._groups:
            rows = slice(group.start, group.start + len(group.requests))
            out[rows] = self._attend_group(call, group, q_THD[rows], k_THD[rows], v_THD[rows])
        return out[None]

    def _attend_chunk(self, call: AttentionCall, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq, strategy = chunk.request.seq, chunk.request.strategy
        assert seq is not None
        blocks, lanes = seq.layout.class_of_layer[call.layer], self._store.lanes.slices[call.layer]
        k, v = self._write(call, blocks, chunk.slots, k, v)
        past = chunk.past_length[lanes]
        columns = -(-int(past.max()) // self._store.block_size)
        reach = strategy.keep.reach(chunk.request.prompt_tokens)
        starts = chunk.dense_starts
        limits = _Limits(
            scale=call.scale,
            softcap=call.softcap,
            window=call.window,
            reach=None if reach is None else (reach.sinks, reach.recent),
            dense_start=None if starts is None else starts[call.window or 0],
        )
        table = chunk.table[lanes, :columns]
        out, lse = chunk_attention(
            q, k, v, chunk.positions, blocks.keys, blocks.values, blocks.positions, table, past.to(q.device),
            sinks=call.sinks, **limits,
        )  # fmt: skip
        if Need.COLUMN_SUMS in strategy.needs:
            self._add_column_sums(call, chunk, blocks, q, k, lse, limits)
        return out

    def _add_column_sums(
        self, call: AttentionCall, chunk: Chunk, blocks: BlockClass, q: Tensor, k: Tensor, lse: Tensor, limits: _Limits
    ) -> None:
        """Add to each cached token the attention that the chunk's observed queries pay it."""
        prompt_tokens = chunk.request.prompt_tokens
        observed = chunk.request.strategy.keep.observed_queries(prompt_tokens)
        first = 0 if observed is None else max(0, prompt_tokens - observed - int(chunk.positions[0]))
        sums, lanes = blocks.column_sums, self._store.lanes.slices[call.layer]
        assert sums is not None
        if first >= chunk.count:
            return
        past = chunk.past_length[lanes] + first  # tokens of the chunk before the first observed one count as past
        table = chunk.table[lanes, : -(-int(past.max()) // self._store.block_size)]
        held = _held(past, table.shape[-1], self._store.block_size).to(table.device)
        owner = self._store.lanes.shape.layers[call.layer].shares_kv_with is None  # the others only add to its votes
        if owner and observed is not None and prompt_tokens - observed >= int(chunk.positions[0]):
            sums.index_fill_(0, table.flatten()[held].long(), 0.0)  # votes of an earlier prompt no longer count
        past_sums, own_sums = column_sums(
            q[first:], k[first:], chunk.positions[first:], lse[:, first:],
            blocks.keys, blocks.positions, table, past.to(q.device), **limits,
        )  # fmt: skip
        _add_to_blocks(sums, table, held, past_sums)
        sums[chunk.slots.block[first:, lanes], chunk.slots.offset[first:, lanes]] += own_sums.T

    def _attend_group(self, call: AttentionCall, group: DecodeGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq = group.requests[0].seq
        assert seq is not None
        blocks, lanes = seq.layout.class_of_layer[call.layer], self._store.lanes.slices[call.layer]
        self._write(call, blocks, group.slots, k, v)
        table, length = group.table[:, lanes, : group.columns[call.layer]], group.length[:, lanes]
        keep = group.strategy.keep
        need_mass = Need.COLUMN_SUMS in group.strategy.needs and keep.observed_queries(1) is None
        out, mass = decode_attention(
            q, blocks.keys, blocks.values, table, length,
            scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            mask=self._mask(call, group, blocks, table, length), need_mass=need_mass,
        )  # fmt: skip
        if need_mass:
            assert blocks.column_sums is not None and mass is not None
            _add_to_blocks(blocks.column_sums, table, self._held_blocks(call, group, table), mass)
        return out

    def _write(
        self, call: AttentionCall, blocks: BlockClass, slots: Slots, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [n, H, D] and return them as a later read will see them."""
        lanes = self._store.lanes.slices[call.layer]
        stored_k, stored_v = k.to(blocks.keys.dtype), v.to(blocks.values.dtype)
        if self._store.lanes.shape.layers[call.layer].shares_kv_with is None:
            block, offset = slots.block[:, lanes], slots.offset[:, lanes]
            blocks.keys[block, offset] = stored_k
            blocks.values[block, offset] = stored_v
        return stored_k.to(k.dtype), stored_v.to(v.dtype)

    def _held_blocks(self, call: AttentionCall, group: DecodeGroup, table: Tensor) -> Tensor:
        """Return the indices of the group's own blocks in ``table``, once for all layers whose lanes are equal."""
        key: object = call.window if group.dense else call.layer
        if key not in group.held:
            length = group.host_length[:, self._store.lanes.slices[call.layer]]
            group.held[key] = _held(length, table.shape[-1], self._store.block_size).to(table.device)
        return group.held[key]

    def _mask(
        self, call: AttentionCall, group: DecodeGroup, blocks: BlockClass, table: Tensor, length: Tensor
    ) -> Tensor | None:
        """Return the additive mask of a layer, computed once for all layers whose lanes are equal."""
        key: object = call.window if group.dense else call.layer
        if key not in group.masks:
            windowed = call.window is not None
            group.masks[key] = slot_mask(
                length,
                table.shape[2],
                self._store.block_size,
                window=call.window,
                pos_pool=blocks.positions if windowed else None,
                table=table if windowed else None,
                query_position=group.positions,
            )
        return group.masks[key]


def _held(length: Tensor, columns: int, block_size: int) -> Tensor:
    """Return which entries of tables [..., C], flattened, are blocks of their lane: int64 indices [n].

    What stands behind a lane's last block is left over from other times and must not be written to.
    """
    return (torch.arange(columns) < -(-length // block_size)[..., None]).flatten().nonzero().flatten()


def _add_to_blocks(sums: Tensor, table: Tensor, held: Tensor, amounts: Tensor) -> None:
    """Add ``amounts`` [..., C * bs] to the slots of the blocks in ``table`` [..., C]; see `_held`."""
    sums.index_add_(0, table.flatten()[held], amounts.reshape(-1, sums.shape[1])[held])


def make_chunk(store: KVStore, request: Request, count: int, start: int) -> Chunk:
    """Take slots for the next ``count`` prompt tokens; room for them must have been allocated."""
    seq = request.seq
    assert seq is not None
    device = seq.layout.groups[0].blocks.keys.device
    past_length = store.length[seq.row].clone()
    dense_starts = {0: 0, **seq.starts} if seq.dense else None
    slots = _on_device(store.append(seq, count), device)
    columns = int(store.columns_held(seq).max())
    return Chunk(
        request=request,
        start=start,
        count=count,
        positions=torch.arange(seq.seen - count, seq.seen, device=device),
        table=store.table[seq.row, :, :columns].to(device),
        past_length=past_length,
        slots=slots,
        dense_starts=dense_starts,
    )


def make_group(store: KVStore, requests: list[Request], start: int) -> DecodeGroup:
    """Take a slot for the next token of each request; all are of one strategy."""
    seqs = [_sequence(request) for request in requests]
    device = seqs[0].layout.groups[0].blocks.keys.device
    slots = store.append_step(seqs)
    rows = torch.tensor([seq.row for seq in seqs])
    length = store.length[rows]
    per_lane = (-(-length.amax(dim=0) // store.block_size)).tolist()
    columns = [max(per_lane[lanes]) for lanes in store.lanes.slices]
    return DecodeGroup(
        strategy=requests[0].strategy,
        requests=requests,
        start=start,
        positions=torch.tensor([seq.seen - 1 for seq in seqs], device=device),
        table=store.table[rows, :, : max(columns)].to(device),
        length=length.to(device),
        host_length=length,
        columns=columns,
        slots=_on_device(slots, device),
        dense=all(seq.dense for seq in seqs) or _alike(store, length),
    )


def _alike(store: KVStore, length: Tensor) -> bool:
    """Whether all lanes of each sequence are equally long, and no window asks for positions."""
    return not store.lanes.windows and bool((length == length[:, :1]).all())


def _sequence(request: Request) -> Sequence:
    assert request.seq is not None
    return request.seq


def _on_device(slots: Slots, device: torch.device) -> Slots:
    return Slots(block=slots.block.to(device), offset=slots.offset.to(device))
