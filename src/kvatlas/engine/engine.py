"""The engine: add requests, step, take tokens. It owns no thread and no clock of its own."""

from __future__ import annotations

import importlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvatlas.core.errors import CapacityError, ConfigError, UnsupportedError
from kvatlas.core.footprint import Footprint
from kvatlas.core.layout import DEFAULT_BLOCK_SIZE
from kvatlas.core.needs import Artifact, LayerInputs
from kvatlas.core.observer import NULL, Counter, Observer, SpanKind, observed_by
from kvatlas.core.units import format_bytes, parse_bytes, parse_tier_bytes
from kvatlas.core.vocabulary import Format
from kvatlas.engine.detokenizer import Detokenizer
from kvatlas.engine.drafts import Draft
from kvatlas.engine.forward import Transport
from kvatlas.engine.memory import check_host_memory, check_kv_memory
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.prompts import token_ids
from kvatlas.engine.request import AskedOutput, FinishReason, NewToken, Request
from kvatlas.engine.runner import Batch, Runner
from kvatlas.engine.sampler import Sampler, sample
from kvatlas.engine.scheduler import Scheduler
from kvatlas.engine.selection import Probe
from kvatlas.models.loading import LoadedModel
from kvatlas.storage.arena import Arena
from kvatlas.storage.link import Link, LinkRate
from kvatlas.storage.prefix_cache import PrefixCache
from kvatlas.storage.store import KVStore
from kvatlas.storage.swap import Swapper
from kvatlas.strategies.plan import Plan
from kvatlas.strategies.strategy import Strategy

_LOG = logging.getLogger(__name__)
_FORMATS = {torch.float32: Format.FP32, torch.bfloat16: Format.BF16, torch.float16: Format.FP16}


class Engine:
    """Runs requests with different strategies on one model, in one pool of KV memory.

    Args:
        model: a loaded model.
        kv_memory: byte budget of keys, values and sidecars, such as ``"512MiB"``.
        host_memory: byte budget of the host tier, for strategies that offload and for caches that are swapped out;
            0: there is none.
        link: rate of an *emulated* link between the tiers, such as ``"16GB/s,10us"``; None: moves are as fast as they
            are.
        max_num_seqs: most requests that run at once.
        max_batched_tokens: step token limit; also the most prompt tokens of one chunk.
        block_size: slots per block.
        enable_prefix_caching: share equal prefixes among requests whose strategies allow it.
        kv_format: storage format where a strategy names none; None: the model's own.
        clock: returns seconds; times of requests are on it.
        isolate_failures: let what raises in a step end the requests it belongs to; False: let it raise out of the step,
            for measurements, which a failure voids.
        observer: is told what happens in steps: spans of time and counts, such as a `kvatlas.core.timeline.Timeline`.
        sampler: chooses the tokens; another one where tests or benchmarks decide them, or look at logits.

    Attributes:
        sampler: as above; another may take its place between steps.
        peak_used_bytes: most live bytes so far, sidecars included, cached prefixes left out.
        peak_host_bytes: most bytes of the host tier in use so far.
        peak_running: most requests that held memory at once so far.

    Raises:
        CapacityError: the budget is larger than the memory there is, or too small for one block per lane.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        kv_memory: str | int = "512MiB",
        host_memory: str | int = "1GiB",
        link: str | LinkRate | None = None,
        max_num_seqs: int = 256,
        max_batched_tokens: int = 512,
        block_size: int = DEFAULT_BLOCK_SIZE,
        enable_prefix_caching: bool = True,
        kv_format: Format | None = None,
        clock: Callable[[], float] = time.perf_counter,
        isolate_failures: bool = True,
        observer: Observer = NULL,
        sampler: Sampler = sample,
    ) -> None:
        if max_num_seqs < 1 or max_batched_tokens < 1 or block_size < 1:
            raise ConfigError(
                "max_num_seqs, max_batched_tokens and block_size must be at least 1, got "
                f"{max_num_seqs}, {max_batched_tokens} and {block_size}"
            )
        self.model = model
        self.clock = clock
        self.sampler = sampler
        self._isolates = isolate_failures
        self.max_batched_tokens = max_batched_tokens
        self.format = kv_format or _FORMATS[model.adapter.dtype]
        budget, host_budget = parse_bytes(kv_memory), parse_tier_bytes(host_memory)
        check_kv_memory(budget, model.adapter.device)
        check_host_memory(host_budget)
        way = Link(None if link is None else LinkRate.parse(link), model.adapter.device)
        self.store = KVStore(
            model.adapter.shape, self.format, budget, model.adapter.device, block_size, host_budget, way
        )
        self.transport = Transport(link=way, observer=observer)
        prefix_cache = PrefixCache(self.store) if enable_prefix_caching else None
        self.scheduler = Scheduler(
            self.store,
            prefix_cache,
            model.adapter,
            max_num_seqs,
            max_batched_tokens,
            Swapper(self.store, self.transport.link),
        )
        self._runner = Runner(model.adapter, self.store, self.transport, self.scheduler.publish_prefix, prefix_cache)
        self._detokenizer = Detokenizer(model.tokenizer)
        self._end_ids = _end_ids(model)
        self.peak_used_bytes = self.peak_host_bytes = self.peak_running = 0
        self._ids = (f"request-{number}" for number in itertools.count())

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_work

    @property
    def link(self) -> Link:
        """The way between the tiers, with what it has moved."""
        return self.transport.link

    @property
    def observer(self) -> Observer:
        """Who is told what happens in steps; another may take its place between steps."""
        return self.transport.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self.transport.observer = observer

    @property
    def probe(self) -> Probe | None:
        """How good choices of what to read were, since `observe_selection`."""
        return self.transport.probe

    def observe_selection(self) -> None:
        """Compare from now on what is chosen with the exact scores, beginning anew; slows such strategies a lot."""
        self.transport.probe = Probe()

    def prepare(self, strategy: Strategy) -> Plan:
        """Make ready what a strategy needs beside memory; return what it means for this engine's model.

        Raises:
            UnsupportedError: the model cannot serve it.
            CapacityError: it places keys and values on the host, and there is no host tier.
        """
        plan = self.plan(strategy)
        self.store.layout(plan.cache)
        for need in strategy.needs:
            if isinstance(need, Artifact) and need.name not in self.transport.artifacts:
                self.transport.artifacts[need.name] = _built(need, self.model)
            if isinstance(need, LayerInputs):
                self.model.adapter.watch_inputs()
        return plan

    def plan(self, strategy: Strategy) -> Plan:
        """Return what a strategy means for this engine's model."""
        return strategy.plan(self.store.lanes.shape, self.format, self.store.block_size)

    def footprint(self, strategy: Strategy, prompt_tokens: int, output_tokens: int) -> Footprint:
        """Return the bounds on one request's bytes in this engine."""
        return self._footprint(self.plan(strategy), prompt_tokens, output_tokens)

    def _footprint(self, plan: Plan, prompt_tokens: int, output_tokens: int) -> Footprint:
        bounds = partial(plan.footprint, chunk_tokens=self.max_batched_tokens)
        bound = bounds(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        total = prompt_tokens + output_tokens
        renewed = self.model.adapter.renewed_at(prompt_tokens, total)
        if renewed is None:
            return bound
        return bound.joined(bounds(prompt_tokens=renewed, output_tokens=max(1, total - renewed)))

    def add_request(
        self,
        prompt_ids: Seq[int],
        params: SamplingParams | None = None,
        strategy: str | Strategy = "full",
        *,
        request_id: str | None = None,
        arrival_s: float | None = None,
    ) -> Request:
        """Queue a prompt and return its request.

        Raises:
            ConfigError: the prompt is empty or holds a token id outside the vocabulary, or the strategy is not
                understood.
            UnsupportedError: the model cannot serve it.
            CapacityError: the request could never fit, even alone.
        """
        params = SamplingParams() if params is None else params
        plan = self.prepare(Strategy.parse(strategy))
        ids = self._checked_tokens(prompt_ids, params)
        if not self.has_work:
            self.model.adapter.fast.refresh()
        request = Request(
            id=request_id or next(self._ids),
            tokens=ids,
            params=params,
            plan=plan,
            footprint=self.checked_footprint(plan, len(ids), params.max_tokens),
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            prefill_spans=[(0, len(ids))],
            output_start=len(ids),
            generator=_generator(params),
        )
        self.scheduler.waiting.append(request)
        return request

    def continue_request(self, request: Request, prompt_ids: Seq[int], params: SamplingParams) -> None:
        """Queue a further turn of a finished request that a session holds, on the cache it has."""
        ids = self._checked_tokens(prompt_ids, params)
        tokens = len(request.tokens) + len(ids)
        request.footprint = self.checked_footprint(request.plan, tokens, params.max_tokens)
        start = len(request.tokens) - 1  # the last token of the turn before was never fed
        request.tokens += ids
        request.prefill_spans = [(first, min(end, start)) for first, end in request.prefill_spans] + [(start, tokens)]
        if request.seq is None and self.scheduler.is_one_prompt(request):
            request.prefill_spans = [(0, tokens)]
        request.output_start = tokens
        request.params, request.generator = params, _generator(params)
        request.finish_reason, request.text = None, ""
        request.token_times_s, request.arrival_s = [], self.clock()
        self.scheduler.waiting.append(request)

    def fork_request(self, request: Request) -> Request:
        """Return a copy of a finished request that a session holds; blocks are shared until one of the two writes.

        Raises:
            UnsupportedError: the strategy drops tokens, or keeps more than blocks that two can share.
        """
        if not request.plan.forkable:
            raise UnsupportedError(
                f"a conversation under {request.strategy} cannot be forked, because its cache depends on its history; "
                "fork one under a strategy that keeps every token as it was written, such as 'full' or 'int8'"
            )
        copy = replace(
            request,
            id=next(self._ids),
            tokens=list(request.tokens),
            prefill_spans=list(request.prefill_spans),
            token_times_s=list(request.token_times_s),
            seq=None if request.seq is None else self.store.fork(request.seq),
            swapped=None,  # what waits on the host comes back once; the copy is made anew
        )
        self.scheduler.idle.append(copy)
        return copy

    def step(self) -> list[NewToken]:
        """Run one batch and return the tokens it produced.

        Whatever raises on the way ends the request it belongs to, with ``FinishReason.ERROR`` and `Request.error`, and
        no other. Where that cannot be told, the requests of the step lose their caches and run one by one until each
        has shown that it can.
        """
        with observed_by(self.observer):
            return self._step(self.observer)

    def _step(self, observer: Observer) -> list[NewToken]:
        batch: Batch | None = None
        drafts: list[Draft] = []
        try:
            with observer.span(SpanKind.SCHEDULE):
                batch = self.scheduler.next_batch()
            if not batch.num_tokens:
                return []
            self._note_peaks()
            due, logits_BV = self._runner.run(batch)
            observer.count(Counter.PROMPT_TOKENS, batch.num_tokens - len(batch.decodes))
            due, logits_BV = self._hand_out(due, logits_BV)
            drafts = [Draft(request, self._detokenizer) for request in due]
            with observer.span(SpanKind.SAMPLE):
                chosen = self.sampler(logits_BV, due, self._end_ids)
            observer.count(Counter.OUTPUT_TOKENS, sum(not isinstance(token, Exception) for token in chosen))
            return self._commit(drafts, chosen)
        except BaseException as error:
            for draft in drafts:
                draft.undo()
            self._recover(batch, error)
            if not self._isolates or not isinstance(error, Exception):  # after Ctrl-C too, the caches are right
                raise
            return []

    def _hand_out(self, due: list[Request], logits_BV: Tensor) -> tuple[list[Request], Tensor]:
        """Park those whose next token is chosen outside, with their logits; return the others and theirs [B', V]."""
        ours = [row for row, request in enumerate(due) if request.asked is None]
        if len(ours) == len(due):
            return due, logits_BV
        for request, logits_V in zip(due, logits_BV, strict=True):
            if request.asked is not None:
                self.scheduler.clear(request)
                self.scheduler.park(request)
                request.asked.logits = logits_V
        return [due[row] for row in ours], logits_BV[ours]

    def give(self, request: Request, token_id: int) -> None:
        """Append a token to a request whose output is chosen outside (`AskedOutput`); the next step goes on from it.

        How many will follow is not known, so its footprint grows with it.

        Raises:
            CapacityError: the request has outgrown a tier: it could not go on even alone.
        """
        assert request.asked is not None and request.asked.logits is not None
        request.tokens.append(token_id)
        request.asked.logits = None
        if len(request.output_ids) > request.asked.bounded:
            self._grow(request, request.asked)
        self.scheduler.resume(request)

    def _grow(self, request: Request, asked: AskedOutput) -> None:
        """Make the footprint that of a block more, which is cheaper than token by token, or of one token more."""
        outputs, outgrown = len(request.output_ids), self.store.arena
        for bounded in (outputs + self.store.block_size - 1, outputs):
            bound = self._footprint(request.plan, request.output_start, bounded)
            short = self._outgrown(request.plan, bound)
            if short is None:
                request.footprint, asked.bounded = bound, bounded
                return
            outgrown = short
        name, option = ("host", "host_memory") if outgrown is self.store.host else ("KV", "kv_memory")
        raise CapacityError(
            f"{name} memory of {format_bytes(outgrown.total_bytes)} is full after {len(request.tokens) - 1} tokens of "
            f"one row; attach with more {option} or a strategy that holds less"
        )

    def _note_peaks(self) -> None:
        self.peak_used_bytes = max(self.peak_used_bytes, self.store.books().used)
        if self.store.host is not None:
            self.peak_host_bytes = max(self.peak_host_bytes, self.store.host.books().used)
        self.peak_running = max(self.peak_running, len(self.scheduler.running))

    def _recover(self, batch: Batch | None, error: BaseException) -> None:
        """Put right what a step has left half done: caches that it may have written to are made anew."""
        involved = self.scheduler.blamed() if batch is None else batch.requests
        involved = [request for request in involved if request.finish_reason is None]
        if len(involved) == 1 and isinstance(error, Exception):
            self._fail(involved[0], error)
            return
        if isinstance(error, Exception):
            _LOG.warning("a step of %d requests failed and they run one by one now: %r", len(involved), error)
            _LOG.debug("where it failed", exc_info=error)
        self.scheduler.suspect(involved)

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request that cannot go on; its tokens and text so far stay."""
        _LOG.warning("%s failed and ends: %r", request.id, error)
        _LOG.debug("where it failed", exc_info=error)
        self._drop(request)
        request.finish_reason, request.error = FinishReason.ERROR, error

    def cancel(self, request: Request) -> None:
        """End a request now and give its memory back; cancelling an ended one changes nothing."""
        if request.finish_reason is None:
            self._drop(request)
            request.finish_reason = FinishReason.CANCELLED

    def _drop(self, request: Request) -> None:
        """Give back what a request holds, before it is said to have ended: nobody looks after one that has."""
        self._detokenizer.forget(request)
        self.scheduler.release(request)

    def release(self, request: Request) -> None:
        """Give back what a session's request still holds."""
        self.scheduler.release(request)

    def _commit(self, drafts: Seq[Draft], token_ids: Seq[int | Exception]) -> list[NewToken]:
        now = self.clock()
        news = []
        for draft, token_id in zip(drafts, token_ids, strict=True):
            try:
                if isinstance(token_id, Exception):
                    raise token_id
                news.append(self._accept(draft.request, token_id, now))
                draft.accepted = True
            except Exception as error:
                self._fail(draft.request, error)
                if not self._isolates:
                    raise
        return news

    def _accept(self, request: Request, token_id: int, now: float) -> NewToken:
        """Give a request its next token."""
        self.scheduler.clear(request)
        request.tokens.append(token_id)
        request.token_times_s.append(now)
        stopped = self._detokenizer.advance(request)
        reason = self._finish_reason(request, token_id, stopped)
        text = self._detokenizer.take(request, finished=reason is not None)
        new = NewToken(request=request, token_id=token_id, text=text, finished=reason is not None)
        if request.unread is not None:
            request.unread.append(new)
        if reason is not None:
            if request.held_by_session:
                self._detokenizer.forget(request)
                self.scheduler.park(request)
            else:
                self._drop(request)
        request.finish_reason = reason
        return new

    def _finish_reason(self, request: Request, token_id: int, stopped: bool) -> FinishReason | None:
        params, count = request.params, len(request.output_ids)
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self._end_ids)
        if stopped or (token_id in ends and count > params.min_tokens):
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= params.max_tokens else None

    def _checked_tokens(self, prompt_ids: Any, params: SamplingParams) -> list[int]:
        """Return the prompt as a list of its own, after looking at everything that a step would stumble over."""
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"sampling parameters are a SamplingParams, got {type(params).__name__}; make one")
        if params.stop and self.model.tokenizer is None:
            raise ConfigError(f"{self.model.name} has no tokenizer to look for stop strings; use stop_token_ids")
        ids = token_ids(prompt_ids)
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        vocabulary = self.store.lanes.shape.vocab_size
        wrong = next((token for token in (*ids, *params.stop_token_ids) if token >= vocabulary), None)
        if wrong is not None:
            raise ConfigError(f"token id {wrong} is outside the vocabulary of {vocabulary} tokens")
        return ids

    def checked_footprint(self, plan: Plan, prompt_tokens: int, output_tokens: int) -> Footprint:
        """Return the bounds on a request's bytes.

        Raises:
            CapacityError: the request exceeds the model's positions, or could never fit, even alone.
        """
        bound = self._footprint(plan, prompt_tokens, output_tokens)
        longest = self.store.lanes.shape.max_positions
        if prompt_tokens + output_tokens > longest:
            raise CapacityError(
                f"prompt of {prompt_tokens} tokens + max_tokens {output_tokens} exceeds the {longest} positions of "
                f"{self.model.name}; shorten the prompt or lower max_tokens"
            )
        if (outgrown := self._outgrown(plan, bound)) is not None:
            on_host = outgrown is self.store.host
            capacity = self.store.capacity_bytes(self.store.layout(plan.cache), outgrown)
            raise CapacityError(
                f"prompt of {prompt_tokens} tokens + max_tokens {output_tokens} needs "
                f"{format_bytes(bound.host_bytes if on_host else bound.peak_bytes)} under {plan.strategy}, the "
                f"{'host tier' if on_host else 'pool'} has {format_bytes(capacity)}; "
                f"raise {'--host-memory' if on_host else '--kv-memory'} or choose another strategy"
            )
        return bound

    def _outgrown(self, plan: Plan, bound: Footprint) -> Arena | None:
        """Return the tier that could not hold a request of these bounds even alone; None: none."""
        layout, tiers = self.store.layout(plan.cache), [(self.store.arena, bound.peak_bytes)]
        if self.store.host is not None:
            tiers.append((self.store.host, bound.host_bytes))
        return next((tier for tier, needed in tiers if needed > self.store.capacity_bytes(layout, tier)), None)


def _built(artifact: Artifact, model: LoadedModel) -> Any:
    module, function = artifact.build.split(":")
    return getattr(importlib.import_module(module), function)(model)


def _end_ids(model: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text, as the checkpoint's generation config names them.

    Checkpoints also name ids that their head does not have, -1 among them: these never come and end nothing.
    """
    config = getattr(model.adapter.model, "generation_config", None) or model.adapter.model.config
    ends = getattr(config, "eos_token_id", None)
    named = ends if isinstance(ends, list | tuple) else [ends]
    vocabulary = model.adapter.shape.vocab_size
    return frozenset(end for end in named if type(end) is int and 0 <= end < vocabulary)


def _generator(params: SamplingParams) -> torch.Generator | None:
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator
