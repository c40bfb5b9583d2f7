"""What lies beside keys and values while a forward runs: written with new tokens, shown to stages that choose by it.

Shapes: n tokens of a chunk, R sequences of a group, H KV heads, C table columns, Dk and Dv elements of keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvatlas.core.plan import Recorder
from kvatlas.core.streams import Stream
from kvatlas.core.views import ChunkView, Given, QueryView, TokenView
from kvatlas.engine.segments import Chunk, DecodeGroup, sequence_of
from kvatlas.engine.sources import Blocks
from kvatlas.kernels.blocks import read_keys, read_values
from kvatlas.kernels.gather import gather_slots
from kvatlas.models.attention import AttentionCall
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore
from kvatlas.storage.streams import derive_run, derive_tokens

Recorders = tuple[tuple[Stream, Recorder], ...]
_TOKENS_AT_ONCE = 4096  # past tokens whose entries are made together when a prompt is over, about: whole blocks are


class Beside:
    """Streams and records of one forward.

    Args:
        store: where they lie.
        artifacts: what was worked out for the model, by name, one thing per layer.
    """

    def __init__(self, store: KVStore, artifacts: Mapping[str, Seq[Any]]) -> None:
        self._store = store
        self._artifacts = artifacts

    # Written with new tokens

    def add_chunk(self, layer: int, chunk: Chunk, past: Blocks, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep what stages want of a chunk; at the end of the first prompt, also what they want of it only then.

        Args:
            layer: which; it owns its lanes.
            chunk: the chunk.
            past: where the tokens before it are read, [H, C].
            q: queries [n, Hq, Dk].
            k: keys [n, H, Dk], as a later read will see them.
            v: values [n, H, Dv], likewise.
        """
        seq, plan = sequence_of(chunk.request), chunk.request.plan.layers[layer].store
        lanes, side = self._store.lanes.slices[layer], seq.layout.side_of_layer(layer)
        first = chunk.past_length[lanes]
        first_prompt = (plan.recorded or plan.later) and layer not in seq.begun
        if first_prompt or plan.watched:
            self._observe(layer, chunk, plan.watched + (plan.recorded if first_prompt else ()), q, k)
        if first_prompt and chunk.request.ends_prefill_span:
            self._begin(layer, chunk, past, k.transpose(0, 1), v.transpose(0, 1))
        derived = plan.derived + (plan.later if layer in seq.begun else ())
        if derived and side is not None and chunk.side is not None:
            view = self._tokens(k.transpose(0, 1), v.transpose(0, 1), self.of_sequence(seq, layer))
            derive_run(side, derived, chunk.side[lanes], first, view)

    def add_step(self, layer: int, group: DecodeGroup, k: Tensor, v: Tensor) -> None:
        """Keep what stages want of a step's new tokens: keys [R, H, Dk], values [R, H, Dv], as later reads see them."""
        plan, here, seqs = group.plan.layers[layer].store, group.layers[layer], group.seqs
        side = seqs[0].layout.side_of_layer(layer)
        derived = plan.derived + plan.later
        if derived and side is not None and here.beside is not None:
            fresh = here.slot == here.host_length - 1
            view = self._tokens(k[:, :, None], v[:, :, None], self.of_group(seqs, layer))
            derive_tokens(side, derived, here.beside, here.offset, fresh, view)

    def watch_step(self, layer: int, group: DecodeGroup, q: Tensor, k: Tensor) -> None:
        """Let those who watch every step see its queries [R, Hq, Dk] and keys [R, H, Dk]."""
        given, heads = self.of_group(group.seqs, layer), k.shape[1]
        view = ChunkView(
            query_HGnD=q.reshape(len(q), heads, -1, 1, q.shape[-1]).float(), key_HnD=k[:, :, None].float(),
            records=given.records, artifacts=given.artifacts,
        )  # fmt: skip
        for stream, by in group.plan.layers[layer].store.watched:
            self._set(group.seqs, layer, stream.name, by.observe(stream.name, view))

    def _observe(self, layer: int, chunk: Chunk, recorders: Recorders, q: Tensor, k: Tensor) -> None:
        seq, heads = sequence_of(chunk.request), k.shape[1]
        given = self.of_sequence(seq, layer)
        queries = q.reshape(len(q), heads, -1, q.shape[-1]).permute(1, 2, 0, 3)
        view = ChunkView(
            query_HGnD=queries.float(), key_HnD=k.transpose(0, 1).float(), records=given.records,
            artifacts=given.artifacts,
        )  # fmt: skip
        for stream, by in recorders:
            self._set([seq], layer, stream.name, by.observe(stream.name, view)[None])

    def _begin(self, layer: int, chunk: Chunk, past: Blocks, keys: Tensor, values: Tensor) -> None:
        """Let stages settle their records, and make entries of all tokens before the chunk."""
        seq, plan = sequence_of(chunk.request), chunk.request.plan.layers[layer].store
        given = self.of_sequence(seq, layer)

        def read(what: str) -> Tensor:
            reader, last = {"keys": (read_keys, keys), "values": (read_values, values)}[what]
            before = reader(past.blocks.pool, past.table, torch.float32)[:, : int(past.host_length.max())]
            return torch.cat([before, last.float()], dim=1)

        prompt = TokenView(read=read, records=given.records, artifacts=given.artifacts)
        for by in {id(by): by for _, by in plan.recorded}.values():
            for name, value in by.begin(prompt).items():
                self._set([seq], layer, name, value[None])
        seq.begun.add(layer)
        side, size, length = seq.layout.side_of_layer(layer), self._store.block_size, int(past.host_length.max())
        if not plan.later or side is None or chunk.side is None:
            return
        columns = max(1, _TOKENS_AT_ONCE // size)
        table = chunk.side[self._store.lanes.slices[layer]]
        for first in range(0, past.table.shape[-1], columns):
            part, count = past.table[:, first : first + columns], min(columns * size, length - first * size)
            k, v = (each(past.blocks.pool, part, torch.float32)[:, :count] for each in (read_keys, read_values))
            start = torch.full((len(table),), first * size)
            derive_run(side, plan.later, table, start, self._tokens(k, v, given))

    def _set(self, seqs: Seq[Sequence], layer: int, name: str, value: Tensor) -> None:
        """Write a record [R, H, width] of some sequences."""
        kept = seqs[0].layout.records_of_layer(layer)
        assert kept is not None
        view = kept.pool.view(name)
        view[self._store.record_ids(seqs, self._store.lanes.slices[layer]).to(kept.device), 0] = value.to(view.dtype)

    def _tokens(self, keys: Tensor, values: Tensor, given: Given) -> TokenView:
        return TokenView(
            read=lambda what: (keys if what == "keys" else values).float(), records=given.records,
            artifacts=given.artifacts,
        )  # fmt: skip

    # Shown

    def of_sequence(self, seq: Sequence, layer: int) -> Given:
        """Show what is known of a layer of one sequence: records are [H, width]."""
        given = self.of_group([seq], layer)
        return replace(given, records=lambda name: given.records(name)[0])

    def of_group(self, seqs: Seq[Sequence], layer: int) -> Given:
        """Show what is known of a layer of some sequences: records are [R, H, width]."""
        kept = seqs[0].layout.records_of_layer(layer)

        def records(name: str) -> Tensor:
            assert kept is not None
            return kept.pool.view(name)[
                self._store.record_ids(seqs, self._store.lanes.slices[layer]).to(kept.device), 0
            ]

        return Given(records=records, artifacts=lambda name: self._artifacts[name][layer])

    def query(
        self, call: AttentionCall, group: DecodeGroup, query: Tensor, parts: Seq[Blocks], *, ahead: bool
    ) -> QueryView:
        """Show the queries [R, Hq, Dk] of a step, and what lies beside the slots of some parts of each lane, in order.

        Args:
            call: of which layer.
            group: whose.
            query: as above.
            parts: encoded blocks, if any, and the lanes' own; the newest token is in the last.
            ahead: the newest token has no key yet, so its slot, the last, is not shown.
        """
        here, given, size = group.layers[call.layer], self.of_group(group.seqs, call.layer), self._store.block_size
        before = sum(part.table.shape[-1] for part in parts[:-1]) * size
        own = parts[-1]
        beside = [part for part in parts if part.side is not None]

        def sides(name: str) -> Tensor:
            found = []
            for part in beside:
                entries = part.entries(name)
                found.append(gather_slots(entries.pool.view(name), entries.table))
            return found[0] if len(found) == 1 else torch.cat(found, dim=2)

        def located() -> Tensor:
            found = []
            for part in parts:
                where = gather_slots(part.blocks.positions, part.table.to(part.blocks.device)).to(query.device)
                used = torch.arange(where.shape[-1], device=query.device) < part.length[..., None]
                found.append(where.masked_fill(~used, -1))
            return torch.cat(found, dim=-1)

        return QueryView(
            seen_R=group.positions + 1,
            prompt_R=torch.tensor([request.prompt_tokens for request in group.requests], device=query.device),
            located=located,
            query_RHGD=query.reshape(len(query), here.slot.shape[1], -1, query.shape[-1]),
            length_RH=own.length + before,
            newest_RH=None if ahead else (here.slot + before).to(query.device),
            block_size=size,
            scale=call.scale,
            sides=sides,
            entries=lambda name: [part.entries(name) for part in beside],
            records=given.records,
            artifacts=given.artifacts,
        )
