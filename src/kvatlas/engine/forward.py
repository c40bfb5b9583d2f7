"""One forward over a packed batch: where each token's keys and values go, and what each query reads.

A step's batch is a row of *segments*: chunks of prompts first, then groups of decode steps of one kind of strategy.
Attention of a chunk runs per sequence; a decode group is one call over all its sequences and heads.

Shapes: T packed tokens, n tokens of a chunk, R sequences of a group, H KV heads, C table columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from kvatlas.core.timeline import EventKind, Timeline
from kvatlas.core.views import TokenView
from kvatlas.engine.segments import Chunk, DecodeGroup, sequence_of
from kvatlas.engine.selection import choose_pages
from kvatlas.engine.sources import Blocks, old_blocks
from kvatlas.engine.speculation import Choice, Foresee, Sketch, Speculator, by_kv_head, choose
from kvatlas.engine.staging import Staging, Transfer, Visitors
from kvatlas.kernels.blocks import read_keys, rounded, write_slots
from kvatlas.kernels.chunk_attention import chunk_attention
from kvatlas.kernels.column_sums import column_sums
from kvatlas.kernels.decode_attention import NewTokens, decode_attention
from kvatlas.kernels.pool import Part
from kvatlas.models.adapter import AttentionCall
from kvatlas.storage.arena import BlockClass, SideClass
from kvatlas.storage.link import Link
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore
from kvatlas.storage.streams import derive_run, derive_tokens

_SKETCH_SLOTS = 4096  # past keys that enter a sketch at a time, about: whole blocks do


@dataclass(kw_only=True)
class Transport:
    """What forwards use to read the host; one per engine.

    Args:
        link: the way between the tiers.
        timeline: notes what happens when, or None.
        speculator: foresees what a layer reads; None until a strategy asks for it.
    """

    link: Link
    timeline: Timeline | None = None
    speculator: Speculator | None = None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a segment reads one layer: blocks, the table [.., H, C] into them, and whether they only visit."""

    blocks: BlockClass
    table: Tensor
    visiting: bool


class _Limits(TypedDict):
    """Arguments that attention and its column sums must share."""

    scale: float
    softcap: float | None
    window: int | None
    reach: tuple[int, int] | None


class ForwardPass:
    """Answers a model's attention calls for one batch; made anew for each forward.

    Args:
        store: where keys and values lie.
        chunks: prompt chunks, in order of their rows.
        groups: decode groups, in order of their rows.
        transport: how to read what lies on the host.
    """

    def __init__(self, store: KVStore, chunks: Seq[Chunk], groups: Seq[DecodeGroup], transport: Transport) -> None:
        self._store = store
        self._chunks = chunks
        self._groups = groups
        self._transport = transport
        parts = [chunk.visitors for chunk in chunks] + [group.visitors for group in groups]
        visitors = [each for each in parts if each is not None]
        self._staging = Staging(transport.link, visitors, len(store.lanes.shape.layers), transport.timeline)

    def finish(self) -> None:
        """Return when all new keys and values are where they belong."""
        self._staging.finish()

    def abandon(self) -> None:
        """Leave no move behind after a forward that failed."""
        self._staging.abandon()

    def before_layer(self, layer: int, foresee: Foresee) -> None:
        """Choose and fetch what the next layer will read, for groups whose strategy speculates."""
        speculator, target = self._transport.speculator, layer + 1
        for group in self._groups:
            visitors = group.visitors
            if visitors is None or not visitors.chooses or not visitors.reads_host(target):
                continue
            attend = group.plan.layers[target].attend
            assert attend is not None
            assert speculator is not None
            with self._staging.noted(EventKind.SPECULATE, target):
                query = foresee(target, slice(group.start, group.start + len(group.requests)))
                cached = group.host_length[:, self._store.lanes.slices[target].start] - 1
                sketch = Sketch(self._store, speculator.rotations[target], target)
                shape = self._store.lanes.shape.layers[target]
                most = torch.tensor([attend.most_read(count, shape.group) for count in cached.tolist()])
                choice = choose(sketch.relative(group.seqs, query, cached), attend.margin, most)
                group.choices[target] = choice
                self._staging.bring(target, visitors, visitors.chosen(target, choice.slots, choice.wanted))

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write this layer's keys and values to their slots and return what the queries read [1, T, Hq, Dv]."""
        self._staging.enter(call.layer)
        if self._transport.timeline is None:
            return self._attend_rows(call, query, key, value)
        with self._staging.noted(EventKind.ATTEND, call.layer):
            return self._attend_rows(call, query, key, value)

    def _attend_rows(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q_THD, k_THD, v_THD = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        if not self._chunks and len(self._groups) == 1:  # most steps
            return self._attend_group(call, self._groups[0], q_THD, k_THD, v_THD)[None]
        out = q_THD.new_empty((q_THD.shape[0], q_THD.shape[1], v_THD.shape[2]))
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.start + chunk.count)
            out[rows] = self._attend_chunk(call, chunk, q_THD[rows], k_THD[rows], v_THD[rows])
        for group in self._groups:
            rows = slice(group.start, group.start + len(group.requests))
            out[rows] = self._attend_group(call, group, q_THD[rows], k_THD[rows], v_THD[rows])
        return out[None]

    def _attend_chunk(self, call: AttentionCall, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq, keep = sequence_of(chunk.request), chunk.request.plan.layers[call.layer].keep
        lanes = self._store.lanes.slices[call.layer]
        past = chunk.past_length[lanes]
        source = self._source(call, seq, chunk.visitors, chunk.table[lanes][None])
        home = seq.layout.of_layer(call.layer)
        block, offset = chunk.slots.block[:, lanes], chunk.slots.offset[:, lanes]
        k, v = self._write(call, home, block, offset, k, v, source.visiting)
        self._derive_chunk(call, chunk, k, v)
        reach = keep.reach(chunk.request.prompt_tokens)
        limits = _Limits(
            scale=call.scale,
            softcap=call.softcap,
            window=call.window,
            reach=None if reach is None else (reach.sinks, reach.recent),
        )
        parts = self._past_parts(call, chunk, Blocks.of(source.blocks, source.table[0], past.to(q.device), past))
        out, lse = chunk_attention(q, k, v, chunk.positions, parts, sinks=call.sinks, **limits)
        received = chunk.request.plan.layers[call.layer].received
        if received is not None:
            self._add_column_sums(call, chunk, source, q, k, lse, limits, received.queries)
        if source.visiting and chunk.request.plan.layers[call.layer].attend is not None:
            self._extend_sketch(call, chunk, source, q, k)
        return out

    def _derive_chunk(self, call: AttentionCall, chunk: Chunk, k: Tensor, v: Tensor) -> None:
        """Write what is made of a chunk's keys and values [n, H, D] beside them."""
        layer = chunk.request.plan.layers[call.layer].store
        if layer.derived and self._stores(call.layer):
            lanes, side = self._store.lanes.slices[call.layer], self._side(sequence_of(chunk.request), call.layer)
            assert side is not None and chunk.side is not None
            derive_run(side, layer.derived, chunk.side[lanes], chunk.past_length[lanes], _shown(k, v))

    def _side(self, seq: Sequence, layer: int) -> SideClass | None:
        return seq.layout.side_of_layer(layer)

    def _stores(self, layer: int) -> bool:
        """Whether a layer's keys and values are its own: the others read those of an earlier one."""
        return self._store.lanes.shape.layers[layer].shares_kv_with is None

    def _derive_step(self, call: AttentionCall, group: DecodeGroup, k: Tensor, v: Tensor) -> None:
        """Write what is made of the keys and values [R, H, D] of a step beside them."""
        layer, here = group.plan.layers[call.layer].store, group.layers[call.layer]
        side = self._side(group.seqs[0], call.layer)
        if side is not None and self._stores(call.layer):
            assert here.beside is not None
            fresh = (here.slot == here.host_length - 1) & (here.slot % self._store.block_size == 0)
            view = _shown(rounded(k, layer.own.format), rounded(v, layer.own.format))
            derive_tokens(side, layer.derived, here.beside, here.offset, fresh, view)

    def _past_parts(self, call: AttentionCall, chunk: Chunk, own: Blocks) -> list[Part]:
        """Return what a chunk reads of the past: encoded blocks, then ``own``."""
        starts, old = chunk.dense_starts, self._old(call, chunk)
        parts = [own.part(dense_start=None if starts is None else starts[call.window or 0])]
        if old is not None:
            parts.insert(0, old.part(hide_empty=starts is None, dense_start=None if starts is None else 0))
        return parts

    def _old(self, call: AttentionCall, segment: Chunk | DecodeGroup) -> Blocks | None:
        """Return the encoded blocks of a layer, [H, C] for a chunk; None if there are none."""
        seq = sequence_of(segment.request) if isinstance(segment, Chunk) else segment.seqs[0]
        found = old_blocks(seq.layout, segment.old, call.layer, self._store.lanes.slices[call.layer])
        return found.first() if found is not None and isinstance(segment, Chunk) else found

    def _source(self, call: AttentionCall, seq: Sequence, visitors: Visitors | None, table: Tensor) -> _Source:
        """Return where a segment reads a layer; ``table`` [R, H, C] holds where its blocks live."""
        if visitors is None or not visitors.reads_host(call.layer):
            return _Source(blocks=seq.layout.of_layer(call.layer), table=table, visiting=False)
        blocks, stage = visitors.stage(call.layer)
        return _Source(blocks=blocks, table=stage.to(blocks.device), visiting=True)

    def _add_column_sums(
        self,
        call: AttentionCall,
        chunk: Chunk,
        source: _Source,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        limits: _Limits,
        observed: int | None,
    ) -> None:
        """Add to each cached token what the chunk's queries pay it that are among the prompt's last ``observed``."""
        prompt_tokens, seq = chunk.request.prompt_tokens, sequence_of(chunk.request)
        first = 0 if observed is None else max(0, prompt_tokens - observed - int(chunk.positions[0]))
        home, lanes = seq.layout.of_layer(call.layer), self._store.lanes.slices[call.layer]
        side = self._side(seq, call.layer)
        assert side is not None and chunk.side is not None and chunk.slots.side is not None
        if first >= chunk.count:
            return
        before = chunk.past_length[lanes]
        past = before + first  # tokens of the chunk before the first observed one count as past
        at_home = Blocks.of(home, chunk.table[lanes], past.to(q.device), past, (side, chunk.side[lanes]))
        own = replace(at_home, blocks=source.blocks, table=source.table[0, :, : at_home.table.shape[-1]])
        owner = self._stores(call.layer)  # the others only add to its votes
        fresh = owner and observed is not None and prompt_tokens - observed >= int(chunk.positions[0])
        if source.visiting and first:  # the buffer has the past, but not yet the chunk's own unobserved tokens
            self._write_visiting(source, chunk.slots.index[:first, lanes], k[:first], None)
            self._write_positions(source, chunk.slots.index[:first, lanes], chunk.positions[:first])
        past_sums, own_sums = column_sums(
            q[first:], k[first:], chunk.positions[first:], lse[:, first:], self._past_parts(call, chunk, own), **limits
        )
        old = self._old(call, chunk)
        credited = [at_home] if old is None else [old, at_home]
        for where, amounts in zip(credited, past_sums, strict=True):
            where.add_received(amounts, where.held(), fresh=fresh)  # votes of an earlier prompt no longer count
        own_slots = chunk.slots.side[first:, lanes], chunk.slots.offset[first:, lanes]
        side.pool.view("received")[own_slots] += own_sums.T[..., None]

    def _extend_sketch(self, call: AttentionCall, chunk: Chunk, source: _Source, q: Tensor, k: Tensor) -> None:
        """Give the sketch the chunk's keys; at the end of the first prompt, choose its columns and fill it."""
        assert self._transport.speculator is not None
        seq, lanes = sequence_of(chunk.request), self._store.lanes.slices[call.layer]
        sketch = Sketch(self._store, self._transport.speculator.rotations[call.layer], call.layer)
        past = int(chunk.past_length[lanes.start])
        if not sketch.has_columns(seq):
            sketch.weigh(seq, q, k)
            if not chunk.request.ends_prefill_span:
                return
            sketch.choose_columns(seq)
            size = self._store.block_size
            columns, most = max(1, _SKETCH_SLOTS // size), -(-past // size)
            for first in range(0, most, columns):
                table = source.table[0, :, first : min(first + columns, most)]
                keys = read_keys(source.blocks.pool, table, k.dtype)[:, : past - first * size]
                sketch.write(seq, first * size, keys)
        sketch.write(seq, past, k.transpose(0, 1))

    def _attend_group(self, call: AttentionCall, group: DecodeGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq, plan, here = group.seqs[0], group.plan.layers[call.layer], group.layers[call.layer]
        home = seq.layout.of_layer(call.layer)
        source = self._source(call, seq, group.visitors, here.table)
        new = None
        if source.visiting:
            k, v = self._write(call, home, here.block, here.offset, k, v, source.visiting)
        elif plan.store.derived:  # by which tokens may be chosen, the new ones too
            self._put(call, home, here.block, here.offset, k, v, on_host=False)
        elif self._stores(call.layer):
            new = NewTokens(here.block, here.offset, k, v)
        choice = group.choices.get(call.layer)
        length, host_length, columns = here.length, here.host_length, group.columns[call.layer]
        if choice is not None:
            host_length, columns = choice.count[:, None].expand_as(here.slot) + 1, self._columns(choice.count)
            length = host_length.to(q.device)
        if source.visiting:
            self._write_visiting(source, here.slot if choice is None else host_length - 1, k, v)
        own = Blocks(blocks=source.blocks, table=source.table[..., :columns], length=length, host_length=host_length)
        read = None
        if plan.store.derived:
            self._derive_step(call, group, k, v)
        pages = plan.pages(self._store.block_size)
        if pages is not None and here.side is not None:
            side = self._side(seq, call.layer)
            assert side is not None
            read = choose_pages(q, own, (side, here.side[..., :columns]), pages, here.slot)
        old = None if group.old is None else self._old(call, group)
        last = own.part() if read is None else read
        parts = [last] if old is None else [old.part(hide_empty=plan.evicts), last]
        received = plan.received
        need_mass = received is not None and received.in_decode
        alike: object = call.window if group.dense else call.layer
        out, masses = decode_attention(
            q, parts, scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            window=call.window if choice is None else None, query_position=group.positions, need_mass=need_mass,
            shared=None if choice is not None or read is not None else group.shared.setdefault(alike, {}),
            new=new,
        )  # fmt: skip
        if masses is not None:
            side = self._side(seq, call.layer)
            assert side is not None and here.side is not None
            where = replace(own, side=(side, here.side[..., :columns]))
            fresh = received is not None and received.queries is not None and self._stores(call.layer)
            where.add_received(masses[-1], self._held_blocks(alike, group, where), fresh=fresh)
            if old is not None:
                old.add_received(masses[0], old.held(), fresh=fresh)
        if choice is not None:
            self._follow_up(call, group, choice, q, k)
        return out

    def _columns(self, count: Tensor) -> int:
        """Return how many blocks hold the chosen tokens of a lane and the new one."""
        return int(count.max()) // self._store.block_size + 1

    def _follow_up(self, call: AttentionCall, group: DecodeGroup, choice: Choice, q: Tensor, k: Tensor) -> None:
        """Give the sketch the new token's key; account for the choice, if anybody asks."""
        speculator, visitors = self._transport.speculator, group.visitors
        assert speculator is not None and visitors is not None
        rotation, first = speculator.rotations[call.layer], self._store.lanes.slices[call.layer].start
        cached = group.host_length[:, first] - 1
        Sketch(self._store, rotation, call.layer).write_step(group.seqs, cached, k)
        if speculator.account is not None:
            home, table = visitors.home(call.layer)
            keys = read_keys(home.pool, table, torch.float32).to(q.device)
            for row, length in enumerate(cached.tolist()):  # the new key may still be on its way
                keys[row, :, length] = k[row]
            queries = by_kv_head(q.float(), k.shape[1])
            speculator.account.note(queries, keys, choice, cached, rotation)

    def _write(
        self,
        call: AttentionCall,
        blocks: BlockClass,
        block: Tensor,
        offset: Tensor,
        k: Tensor,
        v: Tensor,
        visiting: bool,
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [n, H, D] where they live and return them as a later read will see them."""
        stored_k, stored_v = (rounded(each, blocks.layout.format) for each in (k, v))
        self._put(call, blocks, block, offset, stored_k, stored_v, on_host=visiting)
        return stored_k.to(k.dtype), stored_v.to(v.dtype)

    def _put(
        self,
        call: AttentionCall,
        blocks: BlockClass,
        block: Tensor,
        offset: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        on_host: bool,
    ) -> None:
        """Store keys and values, in the background if they live on the host, unless another layer stores them."""
        if not self._stores(call.layer):
            return
        where = block.to(blocks.device), offset.to(blocks.device)

        def put() -> None:
            write_slots(blocks.pool, *where, k.to(blocks.device), v.to(blocks.device))

        self._at_home(call, on_host, put, k.nbytes + v.nbytes)

    def _at_home(self, call: AttentionCall, on_host: bool, write: Callable[[], None], num_bytes: int) -> None:
        """Write now where a layer's blocks live on the device, in the background where they live on the host."""
        if on_host:
            self._staging.store(call.layer, Transfer(copy=write, num_bytes=num_bytes))
        else:
            write()

    def _write_visiting(self, source: _Source, slot: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Write new tokens [n, H, D] to slots [n, H] of the buffer; a chunk's table is the same for all its tokens."""
        write_slots(source.blocks.pool, *self._locate(source, slot), k, v)

    def _write_positions(self, source: _Source, slot: Tensor, positions: Tensor) -> None:
        block, offset = self._locate(source, slot)
        source.blocks.positions[block, offset] = positions.int()[:, None].expand_as(block)

    def _locate(self, source: _Source, slot: Tensor) -> tuple[Tensor, Tensor]:
        table, slot = source.table.long(), slot.to(source.table.device)
        table = table.expand(len(slot), -1, -1)
        return table.gather(-1, (slot // self._store.block_size)[..., None]).squeeze(-1), slot % self._store.block_size

    def _held_blocks(self, alike: object, group: DecodeGroup, own: Blocks) -> Tensor:
        """Return the indices of the group's own blocks in their table, once for all layers whose lanes are equal."""
        if alike not in group.held:
            group.held[alike] = own.held()
        return group.held[alike]


def _shown(k: Tensor, v: Tensor) -> TokenView:
    """Show keys and values to who makes streams of them."""
    return TokenView(read=lambda what: (k if what == "keys" else v).float())
