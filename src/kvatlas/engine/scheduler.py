"""Decide at every step who runs: decode steps first, then prompt chunks, then newcomers whose footprint fits.

Admission compares footprints with free bytes: what a prompt may still need at its peak is set aside until the
prompt is done, so requests with a large prefill peak go one after another, while a strategy that bounds its cache
admits more of them. When blocks run out nevertheless, memory is taken back in this order: cached prefixes, idle
sessions, the request that arrived last. Where the host has room, what is taken is swapped there; else it is computed
or replayed anew. Both tiers are budgeted alike; what is merely swapped to the host gives way to what lives there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence as Seq
from contextlib import contextmanager

from kvatlas.engine.request import Request
from kvatlas.engine.runner import Batch, renewed_at
from kvatlas.engine.staging import staged_slots
from kvatlas.models.adapter import Adapter
from kvatlas.storage.arena import Arena
from kvatlas.storage.eviction import close_holes
from kvatlas.storage.lanes import LaneGroup
from kvatlas.storage.prefix_cache import PrefixCache
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore
from kvatlas.storage.swap import SwappedSequence, Swapper

_LOG = logging.getLogger(__name__)


class Scheduler:
    """Holds the queues and the memory policy.

    Args:
        store: where keys and values lie.
        prefix_cache: shared prefixes, or None to share none.
        adapter: tells which sequences may share computed prefixes.
        max_num_seqs: most requests that run at once.
        max_batched_tokens: step token limit.
        swapper: takes caches to the host and back.

    Attributes:
        num_swaps: how often a cache was taken to the host.
        suspects: those of a step that failed; while there are any, the first runs alone and nobody else does.
    """

    def __init__(
        self,
        store: KVStore,
        prefix_cache: PrefixCache | None,
        adapter: Adapter,
        max_num_seqs: int,
        max_batched_tokens: int,
        swapper: Swapper,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.idle: list[Request] = []
        self.suspects: deque[Request] = deque()
        self._store = store
        self._prefix_cache = prefix_cache
        self._adapter = adapter
        self._max_num_seqs = min(max_num_seqs, max_batched_tokens)  # each may decode in the same step
        self._max_batched_tokens = max_batched_tokens
        self._swapper = swapper
        self._handled: Request | None = None
        self.num_swaps = 0

    def next_batch(self) -> Batch:
        """Return what the next step runs, with room allocated for every token of it."""
        self._handled = None
        for request in self.running:
            with self._handling(request):
                if self._renew(request):
                    self._open(request)
        if self.suspects:
            return self._alone(self.suspects[0])
        decodes = self._decode_steps()
        self._admit()
        limit = self._max_batched_tokens - len(decodes)
        chunks: list[tuple[Request, int]] = []
        for request in list(self.running):
            if request.prefill_end is None or limit <= 0 or request not in self.running:
                continue
            with self._handling(request):
                count = self._chunk(request, limit, protect=decodes + [other for other, _ in chunks])
            if count:
                chunks.append((request, count))
                limit -= count
        decodes = [request for request in decodes if request in self.running]
        return Batch(chunks=chunks, decodes=decodes)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running or self.suspects)

    def blamed(self) -> list[Request]:
        """Return whom an error in `next_batch` belongs to: the one it was busy with, else all that run."""
        return list(self.running) if self._handled is None else [self._handled]

    @contextmanager
    def _handling(self, request: Request) -> Iterator[None]:
        """Note whom `next_batch` is busy with; what raises leaves the note, so no ``finally``."""
        self._handled = request
        yield
        self._handled = None

    def suspect(self, requests: Seq[Request]) -> None:
        """Take the caches of a step that failed; its requests run one by one until each has got a token."""
        for request in requests:
            self.release(request)
            self._forget(request)
            self.suspects.append(request)

    def clear(self, request: Request) -> None:
        """Let a request that got a token run beside others again."""
        if request in self.suspects:
            self.suspects.remove(request)

    def _alone(self, request: Request) -> Batch:
        """Return the next step of a request that runs beside nobody, whoever must give it room."""
        with self._handling(request):
            if request not in self.running:
                if request in self.waiting:  # preempted meanwhile
                    self.waiting.remove(request)
                self._start(request)
            if request.prefill_end is None:
                made = self._make_room(request, 1, protect=[request])
                return Batch(chunks=[], decodes=[request] if made else [])
            count = self._chunk(request, self._max_batched_tokens, protect=[request])
            return Batch(chunks=[(request, count)] if count else [], decodes=[])

    def _chunk(self, request: Request, limit: int, protect: list[Request]) -> int:
        """Return how many prompt tokens a request runs in this step, with room made for them; 0: it must wait."""
        assert request.seq is not None and request.prefill_end is not None
        request.seq.encodes = request.plan.encodes(in_prompt=True)
        self._store.mirror(request.seq, in_use=False)  # a prompt reads everything
        close_holes(self._store, request.seq)  # before room is counted: a closed hole may free a block
        count = self._within_footprint(request, min(request.prefill_end - request.computed, limit))
        return count if self._make_room(request, count, protect) else 0

    def release(self, request: Request) -> None:
        """Take a request out of all queues and give its blocks back."""
        for queue in (self.waiting, self.running, self.idle, self.suspects):
            if request in queue:
                queue.remove(request)
        self._close(request)

    def _close(self, request: Request) -> None:
        """Give back what a request holds on any tier."""
        if request.seq is not None:
            self._store.close(request.seq)
            request.seq = None
        self._drop_swapped(request)

    def park(self, request: Request) -> None:
        """Let a finished turn of a session, or who waits for a token, keep its cache until memory is short."""
        self.running.remove(request)
        self.idle.append(request)

    def resume(self, request: Request) -> None:
        """Let a parked request go on: beside those that run if it still has its cache, else once there is room."""
        if request.seq is not None and len(self.running) < self._max_num_seqs:
            self.idle.remove(request)
            self.running.append(request)
        else:
            self.waiting.append(request)

    def publish_prefix(self, request: Request, before: int) -> None:
        """Share the blocks that the last chunk filled; ``before`` tokens were known already."""
        seq, plan = request.seq, request.plan
        if self._prefix_cache is None or seq is None or not plan.traits.prompt_shareable:
            return
        past_prompt = request.computed > request.prefill_spans[0][1]
        if self._changes_regime(request) or (past_prompt and not plan.traits.recomputable):
            return
        done = 0 if before == request.adopted_tokens else before  # what was copied may be exchanged for what was lent
        self._prefix_cache.publish(seq, request.tokens, self._salt(request), done, cuts=plan.evicts)

    def _decode_steps(self) -> list[Request]:
        """Return the running requests that decode; those that cannot get a slot have been preempted."""
        ready = [request for request in self.running if request.prefill_end is None]
        seqs = [request.seq for request in ready if request.seq is not None]
        if not ready:
            return []
        granted: list[Request] = []
        staged = [staged_slots(self._store, request, 1) for request in ready]
        for request, needs_blocks in zip(ready, self._store.needs_blocks(seqs, staged), strict=True):
            if request not in self.running:
                continue
            with self._handling(request):
                if not needs_blocks or self._make_room(request, 1, protect=granted):
                    granted.append(request)
        return [request for request in granted if request in self.running]

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            request = self.waiting[0]
            with self._handling(request):
                started = (not self.running or self._fits(request)) and self._start(request)
            if not started:
                return
            self.waiting.popleft()

    def _fits(self, request: Request) -> bool:
        """Whether the peak of ``request`` fits on each tier beside what is held and what running prompts may take."""
        return self._fits_device(request) and self._fits_host(request)

    def _fits_host(self, request: Request) -> bool:
        """Whether all that ``request`` will ever hold on the host fits: a running request must not run out of it."""
        host = self._store.host
        if host is None or not request.footprint.host_bytes:
            return True
        held = self._held_each([request, *self.running, *self.idle], host)
        promised = sum(max(0, other.footprint.host_bytes - held[other]) for other in self.running)
        books = host.books()
        reclaimable = sum(held[other] for other in self.idle if other is not request)
        reclaimable += sum(other.swapped.host_bytes for other in self._all_swapped() if other.swapped is not None)
        own = request.footprint.host_bytes - held[request]
        return own + promised + books.used - reclaimable <= books.total

    def _fits_device(self, request: Request) -> bool:
        books, prompts = self._store.books(), [other for other in self.running if other.prefill_end is not None]
        held = self._held_each([request, *prompts, *self.idle], self._store.arena)
        promised = sum(max(0, other.footprint.prefill_peak_bytes - held[other]) for other in prompts)
        idle = sum(held[other] for other in self.idle if other is not request)
        bound = request.footprint
        own = bound.peak_bytes if request.num_preemptions else max(bound.prefill_peak_bytes, bound.steady_bytes)
        own -= held[request]
        return own + promised + books.used - idle <= books.total

    def _held(self, request: Request, tier: Arena | None = None) -> int:
        return 0 if request.seq is None else self._store.allocated_bytes(request.seq, tier)

    def _held_each(self, requests: Seq[Request], tier: Arena) -> dict[Request, int]:
        """Return what `_held` says of each request, asked for all at once."""
        holders = [request for request in dict.fromkeys(requests) if request.seq is not None]
        rows = [(request, row) for request in holders for row in (request.seq.rows if request.seq else ())]
        held = dict.fromkeys(requests, 0)
        for (request, _), num_bytes in zip(rows, self._store.row_bytes([row for _, row in rows], tier), strict=True):
            held[request] += num_bytes
        return held

    def _start(self, request: Request) -> bool:
        """Let a request run; False if it must wait for room to be swapped back in."""
        if request in self.idle:
            self.idle.remove(request)
        self._renew(request)
        if request.swapped is not None and not self._swap_in(request):
            return False
        if request.seq is None:
            self._open(request)
        self.running.append(request)
        return True

    def _open(self, request: Request) -> None:
        """Give a request a sequence, with what the prefix cache has of its first prompt."""
        request.seq = self._store.open(self._store.layout(request.plan.cache))
        plan = request.plan
        if self._prefix_cache is not None and plan.traits.prompt_shareable:
            tokens = request.tokens[: request.prefill_spans[0][1]]
            request.adopted_tokens = self._prefix_cache.adopt(
                request.seq,
                tokens,
                self._salt(request),
                most=len(tokens) - plan.unshared_tokens(),
                cuts=plan.evicts,
            )

    def _renew(self, request: Request) -> bool:
        """Give up a cache that the family computes anew for the next token; return whether it does so."""
        tokens = renewed_at(self._adapter, request)
        if tokens is None:
            return False
        self._close(request)
        request.forget_cache()
        request.begin_anew(tokens)
        return True

    def _swap_in(self, request: Request) -> bool:
        """Bring a cache back; if it cannot be while nothing else runs, forget it, so that it is made anew."""
        assert request.swapped is not None
        request.seq = self._swapper.try_swap_in(request.swapped)
        while request.seq is None and self._reclaim_for(request):
            request.seq = self._swapper.try_swap_in(request.swapped)
        if request.seq is not None:
            request.swapped = None
            return True
        if self.running:
            return False
        self._drop_swapped(request)
        return True

    def _reclaim_for(self, request: Request) -> bool:
        """Take device memory back from what does not run, a part at a time; False: there is no more."""
        if self._prefix_cache is not None and self._prefix_cache.reclaim(request.footprint.peak_bytes):
            return True
        idle = [other for other in self.idle if self._held(other)]
        if idle:
            self._take_cache(idle[0])
        return bool(idle)

    def _all_swapped(self) -> list[Request]:
        """Return the requests whose cache is swapped out: idle sessions, then those that need it last first."""
        waiting = [request for request in reversed(self.waiting) if request.swapped is not None]
        return [other for other in self.idle if other.swapped is not None and other not in waiting] + waiting

    def _drop_swapped(self, request: Request) -> None:
        """Give up a swapped cache: it will be computed or replayed anew."""
        if request.swapped is not None:
            self._swapper.drop(request.swapped)
            request.swapped = None
            if request in self.idle:
                self.idle.remove(request)
            self._forget(request)

    def _within_footprint(self, request: Request, count: int) -> int:
        """Return a chunk of at most ``count`` tokens that keeps to the request's footprint on each tier.

        It is shorter only where a preempted request with sliding windows is computed anew: its prompt is then
        longer than the one that the footprint is of.
        """
        if not self._store.lanes.windows:
            return count
        bounds = [(self._store.arena, request.footprint.peak_bytes)]
        if self._store.host is not None:
            bounds.append((self._store.host, request.footprint.host_bytes))
        while count > 1 and any(
            self._held(request, tier) + self._wanted(request, count, tier) > most for tier, most in bounds
        ):
            count = -(-count // 2)
        return count

    def _wanted(self, request: Request, count: int, tier: Arena | None = None) -> int:
        """Return the bytes of a tier that ``count`` more tokens take, less those that encoding gives back first."""
        assert request.seq is not None
        tier, needed = tier or self._store.arena, self._needed(request, count)
        wanted = sum(number * group.blocks.block_bytes for group, number in needed if group.blocks.arena is tier)
        due = self._store.blocks_due(request.seq)
        freed = (
            int(due[group.lanes].sum()) * group.blocks.block_bytes
            for group in request.seq.layout.groups
            if group.blocks.arena is tier
        )
        return wanted - sum(freed)

    def _needed(self, request: Request, count: int) -> list[tuple[LaneGroup, int]]:
        assert request.seq is not None
        return self._store.blocks_needed(request.seq, count, staged_slots(self._store, request, count))

    def _make_room(self, request: Request, count: int, protect: list[Request]) -> bool:
        """Allocate ``count`` slots, taking memory back from others if need be; False: not in this step.

        Requests in ``protect`` are part of this step already and keep their blocks. A request that can take
        nothing from anybody later than itself is preempted.
        """
        assert request.seq is not None
        while not self._store.try_extend(request.seq, count, staged_slots(self._store, request, count)):
            tier = self._store.short_of(self._needed(request, count)) or self._store.arena
            wanted = self._wanted(request, count, tier)
            if self._prefix_cache is not None and self._prefix_cache.reclaim(wanted, tier):
                continue
            if tier is self._store.host and (swapped := self._all_swapped()):
                self._drop_swapped(swapped[0])
                continue
            if idle := [other for other in self.idle if self._held(other, tier)]:
                self._take_cache(idle[0], swap=tier is not self._store.host)
                continue
            victim = self._latest_holder(tier, request, protect)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _latest_holder(self, tier: Arena, taker: Request, protect: list[Request]) -> Request:
        """Return the latest request that holds memory of a tier, or the taker itself, if that is later."""
        holders = (request for request in self.running if request is taker or self._held(request, tier))
        return max((request for request in holders if request not in protect), key=lambda request: request.arrival_s)

    def _preempt(self, request: Request) -> None:
        """Take the cache of a running request and queue it first; it will be swapped in, computed or replayed anew."""
        self._take_cache(request)
        self.running.remove(request)
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _take_cache(self, request: Request, *, swap: bool = True) -> None:
        """Swap a cache to the host, or give it up where that has no room; a swapped idle session stays idle."""
        assert request.seq is not None
        if swap:
            request.swapped = self._try_swap_out(request.seq)
            host = self._store.host
            if request.swapped is None and host is not None and self._prefix_cache is not None:
                self._prefix_cache.reclaim(self._held(request), host)
                request.swapped = self._try_swap_out(request.seq)
        if request.swapped is not None:
            request.seq = None
            self.num_swaps += 1
            return
        if request in self.idle:
            self.idle.remove(request)
        self._store.close(request.seq)
        self._forget(request)

    def _try_swap_out(self, seq: Sequence) -> SwappedSequence | None:
        """Copy a cache to the host; None if that has no room or the copy fails: neither taker nor owner is to blame."""
        try:
            return self._swapper.try_swap_out(seq)
        except Exception as error:
            _LOG.warning("a cache could not be copied to the host and is given up: %r", error)
            return None

    def _forget(self, request: Request) -> None:
        request.forget_cache()
        if self.is_one_prompt(request):
            request.prefill_spans = [(0, len(request.tokens))]

    def is_one_prompt(self, request: Request) -> bool:
        """Whether all tokens so far, processed as one prompt, give the cache that prompts and steps gave.

        So it is if steps see what prompts see, nothing is dropped, and the RoPE is the same at every length on the way.
        """
        return request.plan.traits.recomputable and not self._changes_regime(request)

    def _changes_regime(self, request: Request) -> bool:
        regime = self._adapter.rope_regime
        return regime(request.prefill_spans[0][1]) != regime(len(request.tokens))

    def _salt(self, request: Request) -> str:
        """What must be equal, beside tokens and layout, for two prefixes to be computed alike."""
        return str(self._adapter.rope_regime(request.prefill_spans[0][1]))
