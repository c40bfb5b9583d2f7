"""Answers under random schedules and far too little memory of both tiers: those of each request alone.

Requests of all kinds, sessions, forks and cancellations compete; caches are swapped, computed or replayed anew, and
prefixes are shared and given up. In the end nobody holds anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.driving import STEP_LIMIT, Job, assert_empty, check, drive, force, loaded, relative_error
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import CapacityError
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.models.loading import LoadedModel

TOLERANCE = 1e-4
CHUNK = 16
STRATEGIES = {
    "llama": (
        "full", "h2o(heavy=5, recent=4)", "snapkv(budget=9, window=4)", "streaming_llm(sinks=2, recent=9)",
        "offload(host)", "offload(host, false)", "h2o(heavy=5, recent=4) | offload(host)",
        "rehearse(alpha=inf, cap=0.5) | offload(host)", "tova(budget=9)", "snapkv(budget=9, window=4) | ada",
        "h2o(heavy=5, recent=4) | ada | offload(host)", "knorm(budget=9, sinks=1, recent=2) | pyramid(beta=3)",
        "h2o(heavy=5, recent=4, layers=1-)", "quest(budget=12, dense=1)", "h2o(heavy=5, recent=4) | ada(floor=0.0)",
        "quest(budget=12, dense=1) | offload(host, resident=14)",
        "snapkv(budget=9, window=4) | pyramid(beta=3)", "h2o(heavy=5, recent=4, layers=0) | offload(host, layers=1-)",
    ),
    "gemma4_text": (
        "full", "snapkv(budget=9, window=4) | ada", "tova(budget=9, layers=1-)", "h2o(heavy=5, recent=4)",
        "offload(host)", "h2o(heavy=5, recent=4) | offload(host)",
        "quest(budget=12, dense=1) | offload(host, resident=14)",
    ),
}  # fmt: skip
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))
IDS = token_ids(128)[0].tolist()


@cache
def model(family: str) -> LoadedModel:
    return loaded(tiny_model(family))


def engine_of(family: str, **options) -> Engine:
    options = {"kv_memory": "2MiB", "host_memory": "2MiB", "enable_prefix_caching": False, **options}
    return Engine(model(family), block_size=4, max_batched_tokens=CHUNK, **options)


@cache
def slab_bytes(family: str) -> int:
    return engine_of(family).store.arena.slab_bytes


def tight(data: st.DataObject, family: str) -> Engine:
    """Return an engine with room for about one or two requests on the device, and for none to a few on the host."""
    return engine_of(
        family,
        kv_memory=data.draw(st.integers(2, 6)) * slab_bytes(family),
        host_memory=data.draw(st.integers(0, 8)) * slab_bytes(family),
        max_num_seqs=data.draw(st.integers(1, 5)),
        enable_prefix_caching=data.draw(st.booleans()),
    )


def job(strategy: str, prompt_tokens: int) -> Job:
    ids = token_ids(prompt_tokens + 12, seed=prompt_tokens)[0].tolist()
    return Job(ids[:prompt_tokens], ids[prompt_tokens:], strategy)


@cache
def alone(family: str, strategy: str, prompt_tokens: int) -> torch.Tensor:
    (done,) = drive(engine_of(family), [job(strategy, prompt_tokens)])
    return torch.stack(done.logits)


def step(engine: Engine, times: int) -> None:
    for _ in range(times):
        if engine.has_work:
            engine.step()
            check(engine)


def to_the_end(engine: Engine) -> None:
    for _ in range(STEP_LIMIT // 10):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("goes round in circles")


def requests_compete(data: st.DataObject, family: str, count: int) -> None:
    engine, jobs = tight(data, family), []
    force(engine, jobs)
    for _ in range(count):
        new = job(data.draw(st.sampled_from(STRATEGIES[family])), data.draw(st.sampled_from([3, 9, 21, 34])))
        try:
            new.request = engine.add_request(new.prompt, SamplingParams(max_tokens=12, ignore_eos=True), new.strategy)
        except CapacityError:
            continue
        jobs.append(new)
        step(engine, data.draw(st.sampled_from([0, 0, 1, 3, 8])))
        if engine.scheduler.running and data.draw(st.sampled_from([False, False, True])):
            engine.scheduler._preempt(data.draw(st.sampled_from(engine.scheduler.running)))
        if data.draw(st.sampled_from([False] * 5 + [True])):
            engine.cancel(data.draw(st.sampled_from(jobs)).request)
    to_the_end(engine)
    assert_empty(engine)
    for done in jobs:
        wanted = alone(family, done.strategy, len(done.prompt))
        assert done.request.finish_reason == "cancelled" or len(done.logits) == len(wanted)
        for number, got in enumerate(done.logits):
            error = relative_error(got, wanted[number])
            assert error < TOLERANCE, f"{done.strategy}, prompt of {len(done.prompt)}, output {number}: {error:.1e}"


@settings(SETTINGS, max_examples=8)
@given(st.data(), st.sampled_from(["llama", "llama", "gemma4_text"]))
def test_requests_that_compete_answer_as_alone(data: st.DataObject, family: str) -> None:
    requests_compete(data, family, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(SETTINGS, max_examples=120)
@given(st.data(), st.sampled_from(["llama", "llama", "gemma4_text"]))
def test_requests_that_compete_answer_as_alone_long(data: st.DataObject, family: str) -> None:
    requests_compete(data, family, 12)


# Sessions


@dataclass(eq=False)
class Talk:
    """A session: what it was asked, turn by turn, and what it answered; ``None`` stands for a turn refused."""

    strategy: str
    request: Request | None = None
    turns: list[tuple[list[int], int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    of: Talk | None = None

    @property
    def busy(self) -> bool:
        return self.request is not None and self.request.finish_reason is None

    def ask(self, engine: Engine, prompt: list[int], outputs: int) -> None:
        """Queue the next turn, if it can ever fit."""
        params = SamplingParams(max_tokens=outputs, ignore_eos=True)
        try:
            if self.request is None:
                self.request = engine.add_request(prompt, params, self.strategy)
                self.request.held_by_session = True
            else:
                engine.continue_request(self.request, prompt, params)
        except CapacityError:
            return
        self.turns.append((prompt, outputs))

    def note(self) -> None:
        """Remember the answer of a turn that has ended."""
        if self.request is not None and not self.busy and len(self.answers) < len(self.turns):
            self.answers.append(list(self.request.output_ids))


def retold(family: str, talk: Talk) -> list[list[int]]:
    """Return the answers of the same turns in an engine with room for everything."""
    engine, again = engine_of(family), Talk(talk.strategy)
    for prompt, outputs in talk.turns:
        again.ask(engine, prompt, outputs)
        to_the_end(engine)
        again.note()
    return again.answers


def sessions_compete(data: st.DataObject, family: str, count: int) -> None:
    engine, talks = tight(data, family), []
    for _ in range(count):
        action = data.draw(st.sampled_from(["open", "ask", "ask", "ask", "step", "step", "fork", "close", "other"]))
        free = [talk for talk in talks if not talk.busy and talk.request is not None]
        start, length = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 20))
        if action == "open" or (action == "ask" and not free):
            talks.append(Talk(data.draw(st.sampled_from(STRATEGIES[family]))))
            talks[-1].ask(engine, IDS[start : start + length], data.draw(st.integers(1, 6)))
        elif action == "ask":
            talk = data.draw(st.sampled_from(free))
            talk.note()
            talk.ask(engine, IDS[start : start + length], data.draw(st.integers(1, 6)))
        elif action == "fork" and (whole := [talk for talk in free if talk.request.plan.forkable]):
            talk = data.draw(st.sampled_from(whole))
            talk.note()
            child = Talk(talk.strategy, engine.fork_request(talk.request), list(talk.turns), list(talk.answers))
            talks.append(child)
        elif action == "close" and talks:
            talk = data.draw(st.sampled_from(talks))
            if talk.request is not None:
                engine.cancel(talk.request)
                engine.release(talk.request)
            talks.remove(talk)
        elif action == "other":
            try:
                engine.add_request(IDS[start : start + length], SamplingParams(max_tokens=5, ignore_eos=True),
                                   data.draw(st.sampled_from(STRATEGIES[family])))  # fmt: skip
            except CapacityError:
                continue
        elif action == "step":
            step(engine, data.draw(st.integers(1, 12)))
        for talk in talks:
            talk.note()
        check(engine)
    to_the_end(engine)
    for talk in talks:
        talk.note()
        if talk.request is not None:
            engine.release(talk.request)
    assert_empty(engine)
    for talk in talks:
        assert talk.answers == retold(family, talk), f"{talk.strategy}, {[len(p) for p, _ in talk.turns]}"


@settings(SETTINGS, max_examples=8)
@given(st.data(), st.sampled_from(["llama", "llama", "gemma4_text"]))
def test_sessions_that_compete_answer_as_alone(data: st.DataObject, family: str) -> None:
    sessions_compete(data, family, 14)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(SETTINGS, max_examples=120)
@given(st.data(), st.sampled_from(["llama", "llama", "gemma4_text"]))
def test_sessions_that_compete_answer_as_alone_long(data: st.DataObject, family: str) -> None:
    sessions_compete(data, family, 25)
