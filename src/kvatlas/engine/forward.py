"""One forward over a packed batch: where each token's keys and values go, and what each query reads.

A step's batch is a row of *segments*: chunks of prompts first, then groups of decode steps of one kind of strategy.
Attention of all chunks is one call, and so is that of a decode group, over all sequences and heads.

Shapes: T packed tokens, n tokens of a chunk, R sequences of a group, H KV heads, C table columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from kvatlas.core.needs import Received
from kvatlas.core.observer import NULL, Observer, SpanKind
from kvatlas.core.views import Selection
from kvatlas.core.vocabulary import Per
from kvatlas.engine.beside import Beside
from kvatlas.engine.segments import Chunk, ChunkBatch, DecodeGroup, batch_chunks, sequence_of
from kvatlas.engine.selection import Probe, chosen_blocks, chosen_slots, note_choice, place_of
from kvatlas.engine.sources import Blocks, old_blocks
from kvatlas.engine.staging import Staging, Transfer, Visitors
from kvatlas.engine.votes import votes_of
from kvatlas.kernels.blocks import rounded, write_slots
from kvatlas.kernels.chunk_attention import ChunkRows, chunk_attention
from kvatlas.kernels.column_sums import column_sums
from kvatlas.kernels.decode_attention import NewTokens, decode_attention
from kvatlas.kernels.pool import Credit, Part
from kvatlas.models.attention import AttentionCall, Foresee
from kvatlas.storage.arena import BlockClass, SideClass
from kvatlas.storage.link import Link
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore


@dataclass(kw_only=True)
class Transport:
    """What forwards use to read the host; one per engine.

    Args:
        link: the way between the tiers.
        observer: is told what happens.
        artifacts: what was worked out for the model, by name, one thing per layer.
        probe: compares what is chosen with the exact scores, or None.
    """

    link: Link
    observer: Observer = NULL
    artifacts: dict[str, Seq[Any]] = field(default_factory=dict)
    probe: Probe | None = None


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
        chunks: prompt chunks, in order of their rows; those of one layout follow each other.
        groups: decode groups, in order of their rows.
        transport: how to read what lies on the host.
    """

    def __init__(self, store: KVStore, chunks: Seq[Chunk], groups: Seq[DecodeGroup], transport: Transport) -> None:
        self._store = store
        self._chunks = chunks
        self._batches = batch_chunks(store, chunks)
        self._groups = groups
        self._transport = transport
        self._beside = Beside(store, transport.artifacts)
        parts = [chunk.visitors for chunk in chunks] + [group.visitors for group in groups]
        visitors = [each for each in parts if each is not None]
        self._staging = Staging(transport.link, visitors, len(store.lanes.shape.layers), transport.observer)

    def finish(self) -> None:
        """Return when all new keys and values are where they belong."""
        self._staging.finish()

    def abandon(self) -> None:
        """Leave no move behind after a forward that failed."""
        self._staging.abandon()

    def before_layer(self, layer: int, foresee: Foresee) -> None:
        """Choose and fetch what the next layer will read, for groups whose stage there is asked ahead."""
        target = layer + 1
        for group in self._groups:
            attend = group.plan.layers[target].attend if target < len(group.plan.layers) else None
            if attend is None or not attend.ahead:
                continue
            with self._transport.observer.span(SpanKind.SELECT, target):
                call, query = foresee(target, slice(group.start, group.start + len(group.requests)))
                cached = group.layers[target].host_length - 1
                own = self._own(group, target, cached.to(query.device), cached)
                selection = attend.select(self._beside.query(call, group, query, [own], ahead=True))
                if selection is None:
                    continue
                group.choices[target] = selection
                if group.visitors is not None and group.visitors.reads_host(target):
                    self._staging.bring(target, group.visitors, group.visitors.chosen(target, selection))

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write this layer's keys and values to their slots and return what the queries read [1, T, Hq, Dv]."""
        self._staging.enter(call.layer)
        observer = self._transport.observer
        if observer is NULL:
            return self._attend_rows(call, query, key, value)
        with observer.span(SpanKind.ATTEND, call.layer):
            return self._attend_rows(call, query, key, value)

    def _attend_rows(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q_THD, k_THD, v_THD = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        if not self._chunks and len(self._groups) == 1:  # most steps
            return self._attend_group(call, self._groups[0], q_THD, k_THD, v_THD)[None]
        rows = sum(batch.count for batch in self._batches)
        chunks = self._attend_chunks(call, q_THD[:rows], k_THD[:rows], v_THD[:rows]) if rows else None
        if chunks is not None and not self._groups:
            return chunks[None]
        out = q_THD.new_empty((q_THD.shape[0], q_THD.shape[1], v_THD.shape[2]))
        if chunks is not None:
            out[:rows] = chunks
        for group in self._groups:
            rows_of = slice(group.start, group.start + len(group.requests))
            out[rows_of] = self._attend_group(call, group, q_THD[rows_of], k_THD[rows_of], v_THD[rows_of])
        return out[None]

    def _attend_chunks(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend all chunks of the step in one call; their rows are the first of the batch."""
        stored = [self._write_chunks(call, batch, k, v) for batch in self._batches]
        k, v = stored[0] if len(stored) == 1 else map(torch.cat, zip(*stored, strict=True))
        rows = []
        for chunk in self._chunks:
            here, plan = chunk.layers[call.layer], chunk.request.plan.layers[call.layer]
            source = self._source_of(call, chunk)
            cached = Blocks(blocks=source.blocks, table=source.table, length=here.length, host_length=here.host_length)
            if plan.store.makers and self._stores(call.layer):
                mine = slice(chunk.start, chunk.start + chunk.count)
                self._beside.add_chunk(call.layer, chunk, cached.trimmed(), q[mine], k[mine], v[mine])
            reach = plan.keep.reach(chunk.request.prompt_tokens)
            rows.append(
                ChunkRows(
                    start=chunk.start,
                    count=chunk.count,
                    positions=chunk.places,
                    past=self._past_parts(call, chunk, cached),
                    reach=None if reach is None else (reach.sinks, reach.recent),
                )
            )
        out, lses = chunk_attention(
            q, k, v, rows, scale=call.scale, softcap=call.softcap, sinks=call.sinks, window=call.window,
            need_lse=any(chunk.request.plan.layers[call.layer].received is not None for chunk in self._chunks),
        )  # fmt: skip
        for chunk, its, lse in zip(self._chunks, rows, lses, strict=True) if lses else ():
            received = chunk.request.plan.layers[call.layer].received
            if received is not None:
                source = self._source_of(call, chunk)
                limits = _Limits(scale=call.scale, softcap=call.softcap, window=call.window, reach=its.reach)
                mine = slice(chunk.start, chunk.start + chunk.count)
                self._add_column_sums(call, chunk, source, q[mine], k[mine], lse, limits, received)
        return out

    def _write_chunks(self, call: AttentionCall, batch: ChunkBatch, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of chunks of one layout, and return them as a later read will see them."""
        first, rows = batch.chunks[0], slice(batch.start, batch.start + batch.count)
        visiting = first.visitors is not None and first.visitors.reads_own(call.layer)
        home = sequence_of(first.request).layout.of_layer(call.layer)
        block, offset = batch.block[call.layer], batch.offset[call.layer]
        return self._write(call, home, block, offset, k[rows], v[rows], visiting)

    def _side(self, seq: Sequence, layer: int) -> SideClass | None:
        return seq.layout.side_of_layer(layer)

    def _stores(self, layer: int) -> bool:
        """Whether a layer's keys and values are its own: the others read those of an earlier one."""
        return self._store.lanes.shape.layers[layer].shares_kv_with is None

    def _past_parts(self, call: AttentionCall, chunk: Chunk, own: Blocks) -> list[Part]:
        """Return what a chunk reads of the past: encoded blocks, then ``own``."""
        starts, old = chunk.dense_starts, self._old(call, chunk)
        encoded = 0 if old is None else int(old.host_length.max())
        parts = [own.part(dense_start=None if starts is None else starts[call.window or 0] + encoded)]
        if old is not None:
            old = self._read_old(call, chunk, old, old.table.shape[-1])
            parts.insert(0, old.part(hide_empty=starts is None, dense_start=None if starts is None else 0))
        return parts

    def _old(self, call: AttentionCall, segment: Chunk | DecodeGroup) -> Blocks | None:
        """Return the encoded blocks of a layer, [H, C] for a chunk; None if there are none."""
        seq = sequence_of(segment.request) if isinstance(segment, Chunk) else segment.seqs[0]
        found = old_blocks(seq.layout, segment.old, call.layer, self._store.lanes.slices[call.layer])
        return found.first() if found is not None and isinstance(segment, Chunk) else found

    def _read_old(
        self, call: AttentionCall, segment: Chunk | DecodeGroup, old: Blocks, columns: int, *, chosen: bool = False
    ) -> Blocks:
        """Return encoded blocks where they are read: if they visit, the first ``columns`` of a lane, or the chosen."""
        visitors = segment.visitors
        if visitors is None or not visitors.reads_old(call.layer):
            return old
        blocks, stage = visitors.stage(call.layer)
        if chosen and visitors.stays(call.layer):
            stage = stage.gather(-1, visitors.places(call.layer))
        table = stage[0] if isinstance(segment, Chunk) else stage
        return replace(old, blocks=blocks, table=table[..., :columns].to(blocks.device))

    def _source(self, call: AttentionCall, seq: Sequence, visitors: Visitors | None, table: Tensor) -> _Source:
        """Return where a segment reads a layer; ``table`` [R, H, C] holds where its blocks live."""
        if visitors is None or not visitors.reads_own(call.layer):
            return _Source(blocks=seq.layout.of_layer(call.layer), table=table, visiting=False)
        blocks, stage = visitors.stage(call.layer)
        return _Source(blocks=blocks, table=stage.to(blocks.device), visiting=True)

    def _source_of(self, call: AttentionCall, chunk: Chunk) -> _Source:
        """Return where a chunk reads a layer; its table is [H, C]."""
        found = self._source(call, sequence_of(chunk.request), chunk.visitors, chunk.layers[call.layer].table)
        return replace(found, table=found.table[0]) if found.visiting else found

    def _add_column_sums(
        self,
        call: AttentionCall,
        chunk: Chunk,
        source: _Source,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        limits: _Limits,
        received: Received,
    ) -> None:
        """Put to each cached token what the chunk's queries pay it that count: all, or the prompt's last ones."""
        prompt_tokens, seq, observed = chunk.request.prompt_tokens, sequence_of(chunk.request), received.queries
        first = 0 if observed is None else max(0, prompt_tokens - observed - int(chunk.positions[0]))
        home, lanes = seq.layout.of_layer(call.layer), self._store.lanes.slices[call.layer]
        side = self._side(seq, call.layer)
        assert side is not None and chunk.side is not None and chunk.slots.side is not None
        if first >= chunk.count:
            return
        before = chunk.past_length[lanes]
        past = before + first  # tokens of the chunk before the first observed one count as past
        at_home = Blocks.of(home, chunk.table[lanes], past.to(q.device), past, (side, chunk.side[lanes]))
        own = replace(at_home, blocks=source.blocks, table=source.table[:, : at_home.table.shape[-1]])
        owner = self._stores(call.layer)  # the others only add to its votes
        fresh = owner and observed is not None and prompt_tokens - observed >= int(chunk.positions[0])
        if source.visiting and first:  # the buffer has the past, but not yet the chunk's own unobserved tokens
            self._write_visiting(source, chunk.slots.index[:first, lanes], k[:first], None)
            self._write_positions(source, chunk.slots.index[:first, lanes], chunk.positions[:first])
        past_sums, own_sums = column_sums(
            q[first:], k[first:], chunk.positions[first:], lse[:, first:], self._past_parts(call, chunk, own),
            over=received.over, heads=received.heads, **limits,
        )  # fmt: skip
        old = self._old(call, chunk)
        credited = [at_home] if old is None else [old, at_home]
        for where, amounts in zip(credited, past_sums, strict=True):
            # Votes of an earlier prompt no longer count.
            where.add_received(amounts, where.held(), received.over, fresh=fresh)
        own_slots, votes = (chunk.slots.side[first:, lanes], chunk.slots.offset[first:, lanes]), own_sums.T[..., None]
        view = side.pool.view("received")
        view[own_slots] = torch.maximum(view[own_slots], votes) if received.over == "max" else view[own_slots] + votes

    def _attend_group(self, call: AttentionCall, group: DecodeGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq, plan, here = group.seqs[0], group.plan.layers[call.layer], group.layers[call.layer]
        home = seq.layout.of_layer(call.layer)
        source = self._source(call, seq, group.visitors, here.table)
        stores, kept = self._stores(call.layer), bool(plan.store.derived or plan.store.later)
        new = None
        if source.visiting:
            k, v = self._write(call, home, here.block, here.offset, k, v, source.visiting)
        elif stores:
            new = NewTokens(here.block, here.offset, k, v)
        if kept and stores:
            stored = (each if source.visiting else rounded(each, home.layout.format) for each in (k, v))
            self._beside.add_step(call.layer, group, *stored)
        if plan.store.watched and stores:
            self._beside.watch_step(call.layer, group, q, k)
        own = self._own(group, call.layer, here.length, here.host_length)
        old = None if group.old is None else self._old(call, group)
        selection = self._selection(call, group, q, own, old)
        parts, slots = self._parts(call, group, source, own, old, selection, k, v)
        received = plan.received
        counts = received is not None and received.in_decode
        # Layers whose lanes hold as many tokens in the same parts.
        alike: object = (call.window, plan.store.old, plan.store.residual) if group.dense else call.layer
        # Single slots that visit have no positions.
        slots_moved = source.visiting and selection is not None and selection.per is Per.SLOT
        credit = None
        if counts and received is not None and received.is_sum:
            everywhere = [own] if old is None else [old, own]
            if received.queries is not None and stores:  # what a prompt's queries paid no longer counts
                for each in everywhere:
                    each.clear_received(self._held_blocks(alike, group, own) if each is own else each.held())
            size = q.shape[1] // own.table.shape[1] if received.heads == "mean" else 1
            credit = Credit(entries=[each.entries("received") for each in everywhere], factor=1 / size)
        out, masses = decode_attention(
            q, parts, scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            window=None if slots_moved else call.window, query_position=group.positions, slots=slots,
            need_mass=counts and credit is None, credit=credit,
            shared=None if selection is not None else group.shared.setdefault(alike, {}), new=new,
        )  # fmt: skip
        if masses is not None and received is not None:
            masses = votes_of(received, call, group.positions, q, parts, masses)
            fresh = received.queries is not None and stores
            own.add_received(masses[-1], self._held_blocks(alike, group, own), received.over, fresh=fresh)
            if old is not None:
                old.add_received(masses[0], old.held(), received.over, fresh=fresh)
        if selection is not None and self._transport.probe is not None:
            note_choice(self._transport.probe, call, selection, q, k, own, old, here.slot)
        return out

    def _own(self, group: DecodeGroup, layer: int, length: Tensor, host_length: Tensor) -> Blocks:
        """Return where a layer's own blocks of a group live, and what lies beside them."""
        layout, here, columns = group.seqs[0].layout, group.layers[layer], group.columns[layer]
        side = layout.side_of_layer(layer)
        return Blocks(
            blocks=layout.of_layer(layer),
            table=here.table[..., :columns],
            length=length,
            host_length=host_length,
            side=None if side is None or here.side is None else (side, here.side[..., :columns]),
        )

    def _selection(
        self, call: AttentionCall, group: DecodeGroup, q: Tensor, own: Blocks, old: Blocks | None
    ) -> Selection | None:
        """Return what a stage has chosen to read of a layer, or chooses now; None: everything."""
        attend = group.plan.layers[call.layer].attend
        if attend is None or attend.ahead:
            return group.choices.get(call.layer)
        parts = [own] if old is None else [old, own]
        with self._transport.observer.span(SpanKind.SELECT, call.layer):
            return attend.select(self._beside.query(call, group, q, parts, ahead=False))

    def _parts(
        self,
        call: AttentionCall,
        group: DecodeGroup,
        source: _Source,
        own: Blocks,
        old: Blocks | None,
        selection: Selection | None,
        k: Tensor,
        v: Tensor,
    ) -> tuple[list[Part], Tensor | None]:
        """Return what a step reads of a layer: encoded blocks, then the lanes' own, at home or visiting.

        Where single slots of blocks at home were chosen, these too [R, H, n].
        """
        first = 0 if old is None else old.table.shape[-1]
        here, attend, visitors = group.layers[call.layer], group.plan.layers[call.layer].attend, group.visitors
        if visitors is not None and visitors.late and visitors.reads_host(call.layer):  # nobody could know before
            self._staging.fetch(call.layer, visitors, visitors.wanted(call.layer, selection))
        ahead = attend is not None and attend.ahead
        if source.visiting:
            last, places = self._visiting(call, group, source, own, selection, ahead, k, v)
            if places is not None:
                return [last], places
        elif selection is None:
            last = own.part()
        elif selection.per is Per.BLOCK:
            last = chosen_blocks(own, own.part(), selection, first)
        else:
            assert old is None, "single slots of packed blocks are not chosen"
            slots, length = chosen_slots(own, selection, here.slot if ahead else None)
            return [replace(own.part(), length=length)], slots
        if old is None:
            return [last], None
        before = old.part(hide_empty=group.plan.evicts)
        if selection is not None:
            before = chosen_blocks(old, before, selection, 0)
        seen = self._read_old(call, group, old, before.table.shape[-1], chosen=True)
        if seen is not old:
            before = replace(before, pool=seen.blocks.pool, table=seen.table)
        return [before, last], None

    def _visiting(
        self,
        call: AttentionCall,
        group: DecodeGroup,
        source: _Source,
        own: Blocks,
        selection: Selection | None,
        ahead: bool,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Part, Tensor | None]:
        """Return the blocks through which a layer on the host is read, the new tokens among them.

        Where single slots of these are read, these too [R, H, n].
        """
        here, size = group.layers[call.layer], self._store.block_size
        assert group.visitors is not None
        if group.visitors.stays(call.layer):
            chosen = group.visitors.everything(call.layer) if selection is None else selection
            positions = None if call.window is None else group.positions
            places = group.visitors.places(call.layer)
            return self._resident(places, here.slot, source, own, chosen, ahead, k, v, positions)
        table, length, slot = source.table[..., : own.table.shape[-1]], own.length, here.slot
        if selection is not None and selection.per is Per.SLOT:
            slot = selection.count_RH.cpu() if ahead else place_of(slot, selection)
            length = selection.count_RH.to(k.device) + ahead
            table = source.table[..., : -(-int(length.max()) // size)]
        elif selection is not None:
            part = chosen_blocks(own, own.part(), selection, 0)
            length, table = part.length, source.table[..., : selection.index_RHn.shape[-1]]
            slot = place_of(slot // size, selection) * size + slot % size
        self._write_visiting(source, slot, k, v)
        return Part(pool=source.blocks.pool, table=table, length=length), None

    def _resident(
        self,
        places: Tensor,
        slot: Tensor,
        source: _Source,
        own: Blocks,
        selection: Selection,
        ahead: bool,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
    ) -> tuple[Part, Tensor | None]:
        """Return what `_visiting` does where what was chosen is at some places of a lane; put the new tokens there.

        Where a window compares ``positions``, these too: a block that stays is not fetched again with them.
        """
        size, device = self._store.block_size, k.device
        part = Part(pool=source.blocks.pool, table=source.table, length=own.length)
        if selection.per is Per.SLOT:
            newest = selection.count_RH.cpu() if ahead else place_of(slot, selection)
            self._write_visiting(source, places.gather(-1, newest[..., None])[..., 0], k, v)
            return replace(part, length=selection.count_RH.to(device) + ahead), places.int().to(device)
        newest = place_of(slot // size, selection)
        column = places.gather(-1, newest[..., None])[..., 0]
        self._write_visiting(source, column * size + slot % size, k, v)
        if positions is not None:
            self._write_positions(source, column * size + slot % size, positions)
        length = chosen_blocks(own, own.part(), selection, 0).length
        return replace(part, table=source.table.gather(-1, places.to(source.table.device)), length=length), None

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
