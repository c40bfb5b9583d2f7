"""Drive an engine with outputs decided beforehand, so that two runs can be compared token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.engine.sampler import sample
from kvatlas.models.adapter import Adapter
from kvatlas.models.loading import LoadedModel
from kvatlas.storage.sequence import Sequence as StoredSequence
from kvatlas.storage.store import KVStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_LIMIT = 20_000
"""No test needs more steps; an engine that takes them goes round in circles."""


@dataclass
class Job:
    """One request whose output is decided beforehand, and what the engine did with it.

    Args:
        prompt: token ids.
        outputs: the tokens to generate.
        strategy: what manages the cache.
        logits: [V] for each output token, as the engine computed it before choosing.
        kept: positions in the cache of each lane, ascending, after the step that computed ``logits``.
    """

    prompt: Sequence[int]
    outputs: Sequence[int]
    strategy: str = "full"
    logits: list[Tensor] = field(default_factory=list, repr=False)
    kept: list[list[list[int]]] = field(default_factory=list, repr=False)
    request: Request | None = field(default=None, repr=False)


def loaded(model: PreTrainedModel, tokenizer: Any = None) -> LoadedModel:
    """Return a model that engines can run, without the load-time probe; the model is taken over."""
    name = model.config.model_type
    return LoadedModel(adapter=Adapter(model, name=name), tokenizer=tokenizer, name=name)


class ForcedSampler:
    """Chooses the outputs of jobs and notes their logits and caches in them; tokens of other requests are sampled.

    Args:
        store: of the engine that asks.
        jobs: may grow meanwhile; each needs its request.
    """

    def __init__(self, store: KVStore, jobs: Sequence[Job]) -> None:
        self._store = store
        self._jobs = jobs

    def __call__(
        self, logits_BV: Tensor, requests: Sequence[Request], end_ids: frozenset[int]
    ) -> list[int | Exception]:
        """Return the next token of each request."""
        jobs = [next((job for job in self._jobs if job.request is request), None) for request in requests]
        for row, job in enumerate(jobs):
            if job is not None:
                assert job.request is not None and job.request.seq is not None
                job.logits.append(logits_BV[row].clone())
                job.kept.append(kept_positions(self._store, job.request.seq))
        sampled = sample(logits_BV, requests, end_ids)
        return [
            token if job is None else job.outputs[len(job.logits) - 1] for token, job in zip(sampled, jobs, strict=True)
        ]


def force(engine: Engine, jobs: Sequence[Job]) -> None:
    """Let ``engine`` choose the outputs of ``jobs`` and note its logits and caches in them."""
    engine.sampler = ForcedSampler(engine.store, jobs)


def drive(engine: Engine, jobs: Sequence[Job], *, interrupt_every: int | None = None) -> Sequence[Job]:
    """Run all jobs in one engine at once and return them.

    Args:
        engine: whose tokens are chosen beforehand.
        jobs: what to run.
        interrupt_every: steps after which a running request loses its cache, one after the other; None: never.
    """
    force(engine, jobs)
    for job in jobs:
        params = SamplingParams(max_tokens=len(job.outputs), ignore_eos=True)
        job.request = engine.add_request(job.prompt, params, job.strategy)
    for step in range(1, STEP_LIMIT):
        if interrupt_every is None or not engine.has_work:
            break
        engine.step()
        if engine.scheduler.running and step % interrupt_every == 0 and step < 8 * interrupt_every:
            running = engine.scheduler.running
            engine.scheduler._preempt(running[step // interrupt_every % len(running)])
    finish(engine)
    check(engine)
    for job in jobs:
        if job.request is not None and job.request.error is not None:
            raise job.request.error
    return jobs


def finish(engine: Engine) -> None:
    """Step until all work is done."""
    for _ in range(STEP_LIMIT):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"not finished after {STEP_LIMIT} steps")


def check(engine: Engine) -> None:
    """Assert that the books of both tiers balance."""
    engine.store.arena.check()
    if engine.store.host is not None:
        engine.store.host.check()


def assert_empty(engine: Engine) -> None:
    """Assert that nobody but the prefix cache holds anything on either tier, and that this can be had back."""
    check(engine)
    for arena in (engine.store.arena, engine.store.host):
        if arena is not None:
            assert arena.books().used == 0
            if engine.scheduler._prefix_cache is not None:
                engine.scheduler._prefix_cache.reclaim(10**12, arena)
            assert arena.books().free == arena.books().total
    assert sorted(engine.store.tables.free_rows) == list(range(len(engine.store.table))), "a row of the tables is lost"


def kept_positions(store: KVStore, seq: StoredSequence) -> list[list[int]]:
    """Return the positions that each lane holds, ascending, read from the sidecars."""
    kept: list[list[int]] = [[] for _ in range(store.lanes.count)]
    for row in (seq, *([] if seq.encoded is None else [seq.encoded])):
        for group in row.layout.groups:
            for lane in group.lanes.tolist():
                slot = torch.arange(int(store.length[row.row, lane]))
                slot = slot[slot != store.hole[row.row, lane]]
                block = store.table[row.row, lane, slot // store.block_size].long()
                positions = group.blocks.positions[block, slot % store.block_size]
                kept[lane] = sorted(kept[lane] + positions[positions >= 0].tolist())
    return kept


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted|."""
    return float(torch.linalg.vector_norm(got.double() - wanted.double()) / torch.linalg.vector_norm(wanted.double()))
