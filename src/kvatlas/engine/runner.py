"""Run one scheduled batch: pack it, forward it, let strategies act, and return the logits that are due."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.core.observer import SpanKind
from kvatlas.core.vocabulary import Moment
from kvatlas.engine.eviction import Evictor
from kvatlas.engine.foretelling import note_logprobs
from kvatlas.engine.forward import ForwardPass, Transport
from kvatlas.engine.request import Request
from kvatlas.engine.segments import Chunk, DecodeGroup, make_chunk, make_group, sequence_of
from kvatlas.engine.staging import staged_slots
from kvatlas.models.adapter import Adapter
from kvatlas.storage.eviction import drop_passed_windows
from kvatlas.storage.prefix_cache import PrefixCache
from kvatlas.storage.store import KVStore


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step runs.

    Args:
        chunks: requests in a prompt, each with the number of tokens to process.
        decodes: requests that take one decode step.
    """

    chunks: list[tuple[Request, int]]
    decodes: list[Request]

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row."""
        return sum(count for _, count in self.chunks) + len(self.decodes)

    @property
    def requests(self) -> list[Request]:
        """Whose tokens these are."""
        return [request for request, _ in self.chunks] + self.decodes


class Runner:
    """Forwards batches through one model.

    Args:
        adapter: the model.
        store: where keys and values lie.
        transport: how what lies on the host is read.
        publish: called with a request and the tokens it had before a chunk, while all the chunk's blocks are there.
        prefixes: the prefix cache, if there is one.
    """

    def __init__(
        self,
        adapter: Adapter,
        store: KVStore,
        transport: Transport,
        publish: Callable[[Request, int], None] | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._adapter = adapter
        self._store = store
        self._transport = transport
        self._publish = publish
        self._evictor = Evictor(store, prefixes)

    def run(self, batch: Batch) -> tuple[list[Request], Tensor]:
        """Return the requests whose next token is due, and their logits [B, V].

        Room for every token must have been allocated. Sequences whose RoPE depends on their length run in a
        forward of their own kind (``Adapter.rope_regime``).
        """
        due: list[Request] = []
        logits: list[Tensor] = []
        for regime, pack in _by_regime(self._adapter, batch).items():
            requests, rows = self._run_pack(pack, rope_tokens=None if regime is None else _rope_tokens(pack))
            due += requests
            logits.append(rows)
        return due, torch.cat(logits)

    def _run_pack(self, pack: Batch, rope_tokens: int | None) -> tuple[list[Request], Tensor]:
        span = self._transport.observer.span
        with span(SpanKind.PLACE):
            chunks, groups = self._place(pack)
        order = [(chunk.request, chunk.count) for chunk in chunks]
        order += [(request, 1) for group in groups for request in group.requests]
        tokens: list[int] = []
        due: list[Request] = []
        wanted: list[int] = []  # rows whose logits are
        last: list[int] = []  # which of these are due
        for request, count in order:
            tokens += request.tokens[request.computed - count : request.computed]
            every = request.plan.logprobs
            if every or request.sampling_due:
                wanted += range(len(tokens) - (count if every else 1), len(tokens))
            if request.sampling_due:
                due.append(request)
                last.append(len(wanted) - 1)
        device = self._adapter.device
        token_ids, rows = (torch.tensor(each, dtype=torch.int64, device=device) for each in (tokens, wanted))
        positions = torch.cat([chunk.positions for chunk in chunks] + [group.positions for group in groups])
        with span(SpanKind.FORWARD):
            context = ForwardPass(self._store, chunks, groups, self._transport)
            try:
                logits = self._adapter.forward(token_ids, positions, context, rows, rope_tokens=rope_tokens)
                context.finish()
            except BaseException:  # a move must not outlive what it moves: the blocks may be somebody else's next
                context.abandon()
                raise
        if any(request.plan.logprobs for request, _ in order):
            row_of = torch.full_like(token_ids, -1).scatter_(0, rows, torch.arange(len(rows), device=device))
            note_logprobs(chunks, groups, token_ids, row_of, logits)
            logits = logits[last]
        self._note_peaks([request for request, _ in order])
        with span(SpanKind.EVICT):
            self._evict(chunks, groups)
        return due, logits

    def _note_peaks(self, requests: Seq[Request]) -> None:
        rows = [(request, row) for request in requests for row in sequence_of(request).rows]
        held = dict.fromkeys(map(id, requests), 0)
        for (request, _), num_bytes in zip(
            rows, self._store.row_bytes([r for _, r in rows], self._store.arena), strict=True
        ):
            held[id(request)] += num_bytes
        for request in requests:
            request.peak_bytes = max(request.peak_bytes, held[id(request)])

    def _place(self, pack: Batch) -> tuple[list[Chunk], list[DecodeGroup]]:
        """Take slots for all tokens of the pack, row after row."""
        chunks: list[Chunk] = []
        groups: list[DecodeGroup] = []
        row = 0
        for request, count in _by_layout(pack.chunks):
            chunks.append(make_chunk(self._store, request, count, row))
            row += count
        for requests in _grouped(self._store, pack.decodes):
            groups.append(make_group(self._store, requests, row))
            row += len(requests)
        return chunks, groups

    def _evict(self, chunks: Seq[Chunk], groups: Seq[DecodeGroup]) -> None:
        if self._publish is not None:  # before windows let go of blocks that others could share
            for chunk in chunks:
                self._publish(chunk.request, chunk.request.computed - chunk.count)
        prompts = [chunk.request for chunk in chunks if chunk.request.ends_prefill_span]
        self._evictor.act(Moment.AFTER_CHUNK, [chunk.request for chunk in chunks if chunk.request not in prompts])
        self._evictor.act(Moment.AFTER_PREFILL, prompts)
        self._evictor.act(Moment.AFTER_STEP, [request for group in groups for request in group.requests])
        if self._store.lanes.windows:
            for request in [chunk.request for chunk in chunks] + [r for group in groups for r in group.requests]:
                drop_passed_windows(self._store, sequence_of(request))
        for request in prompts:  # what only a prompt needed goes, once all that goes is gone
            self._store.mirror(sequence_of(request), in_use=True)
            self._store.shrink_staging(sequence_of(request), staged_slots(self._store, request, 1))
            sequence_of(request).encodes = request.plan.encodes(in_prompt=False)


def _by_layout(chunks: Seq[tuple[Request, int]]) -> list[tuple[Request, int]]:
    """Return chunks with those of one layout behind each other, else in order."""
    order: dict[int, int] = {}
    for request, _ in chunks:
        order.setdefault(id(sequence_of(request).layout), len(order))
    return sorted(chunks, key=lambda chunk: order[id(sequence_of(chunk[0]).layout)])


def _grouped(store: KVStore, requests: Seq[Request]) -> list[list[Request]]:
    """Return decode steps by kind of strategy, those of similar cache length together so that little is padded."""
    groups: dict[Hashable, list[Request]] = {}
    rows = [request.seq.row for request in requests if request.seq is not None]
    longest = store.length[rows].amax(dim=1).tolist() if rows else []
    for request, slots in zip(requests, longest, strict=True):
        groups.setdefault((request.plan.kind, (slots // store.block_size).bit_length()), []).append(request)
    return list(groups.values())


def _by_regime(adapter: Adapter, batch: Batch) -> dict[Hashable, Batch]:
    """Return the batch split into parts that may be packed together."""
    packs: dict[Hashable, Batch] = {}
    for request, count in batch.chunks:
        packs.setdefault(_regime(adapter, request), Batch(chunks=[], decodes=[])).chunks.append((request, count))
    for request in batch.decodes:
        packs.setdefault(_regime(adapter, request), Batch(chunks=[], decodes=[])).decodes.append(request)
    return packs


def _regime(adapter: Adapter, request: Request) -> Hashable:
    return adapter.rope_regime(rope_length(request))


def rope_length(request: Request) -> int:
    """Return the length that decides the RoPE of a request's next tokens: a whole prompt at once, then one by one."""
    prompts = (end for start, end in request.prefill_spans if start <= request.computed)
    return max(*prompts, request.computed + 1)


def renewed_at(adapter: Adapter, request: Request) -> int | None:
    """Return how many tokens to process as one prompt, because the family computes the cache anew; None: none."""
    return adapter.renewed_at(request.prefill_spans[0][1], len(request.tokens))


def _rope_tokens(pack: Batch) -> int:
    requests = [request for request, _ in pack.chunks] + pack.decodes
    return max(rope_length(request) for request in requests)
