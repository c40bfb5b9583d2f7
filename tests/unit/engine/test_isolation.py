"""Whatever raises while a step runs ends the request it belongs to; the others answer as if alone."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from tests.driving import assert_empty, finish
from tests.families import token_ids

from kvatlas.core.errors import CapacityError, ConfigError, RequestError
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import FinishReason, Request
from kvatlas.engine.scoring import ScoreJob, score
from kvatlas.models.loading import load_model
from kvatlas.strategies.keep.snapkv import SnapKV

MODEL = load_model(None)
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.9, seed=5)
STRATEGIES = (
    "full", "h2o(heavy=6, recent=5)", "streaming_llm(sinks=2, recent=9)", "snapkv(budget=12, window=4)", "int8",
    "kivi(bits=2, residual=8)", "h2o(heavy=6, recent=5) | kivi(bits=4, residual=8)", "quest(budget=32)",
    "offload(host)", "infinigen",
)  # fmt: skip


def prompt(length: int, seed: int) -> list[int]:
    return [token % MODEL.adapter.shape.vocab_size for token in token_ids(length, seed=seed)[0].tolist()]


def new_engine(**options) -> Engine:
    return Engine(MODEL, **{"kv_memory": "4MiB", "host_memory": "4MiB", "max_batched_tokens": 48, **options})


def alone(ids: list[int], params: SamplingParams, strategy: str) -> list[int]:
    return list(_alone(tuple(ids), params, strategy))


@cache
def _alone(ids: tuple[int, ...], params: SamplingParams, strategy: str) -> tuple[int, ...]:
    engine = new_engine(max_batched_tokens=512)
    request = engine.add_request(ids, params, strategy)
    finish(engine)
    return tuple(request.output_ids)


class BrokenError(Exception):
    pass


def break_runs(engine: Engine, bad: Callable[[Request], bool], *, after: bool) -> list[int]:
    """Let steps raise that ``bad`` requests are part of, before or after they wrote; return the sizes of these."""
    run, failed = engine._runner.run, []

    def breaking(batch):
        wrong = [request for request in batch.requests if bad(request)]
        if wrong and not after:
            failed.append(len(batch.requests))
            raise BrokenError(wrong[0].id)
        done = run(batch)
        if wrong:
            failed.append(len(batch.requests))
            raise BrokenError(wrong[0].id)
        return done

    engine._runner.run = breaking
    return failed


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [0, 30, 43], ids=["first chunk", "later chunk", "decode step"])
@pytest.mark.parametrize("memory", ["4MiB", "1200KiB"])
def test_a_failing_step_ends_the_one_that_failed(after: bool, at: int, memory: str) -> None:
    engine = new_engine(kv_memory=memory)
    bad: list[Request] = []
    failed = break_runs(engine, lambda request: request in bad and request.computed >= at, after=after)
    jobs = [(prompt(20 + 3 * n, n), DRAWN if n % 2 else PARAMS, strategy) for n, strategy in enumerate(STRATEGIES)]
    innocent = [engine.add_request(*job) for job in jobs[:5]]
    bad.append(engine.add_request(prompt(40, 99), PARAMS, "h2o(heavy=9, recent=9)"))
    innocent += [engine.add_request(*job) for job in jobs[5:]]
    finish(engine)
    assert bad[0].finish_reason is FinishReason.ERROR and isinstance(bad[0].error, BrokenError) and bad[0].seq is None
    assert failed[-1] == 1 and len(failed) <= 2, "once among others, once alone"
    for request, job in zip(innocent, jobs, strict=True):
        assert request.error is None and request.output_ids == alone(*job), job[2]
    assert_empty(engine)


def test_a_passing_failure_ends_nobody() -> None:
    engine = new_engine()
    jobs = [(prompt(30, n), DRAWN, strategy) for n, strategy in enumerate(STRATEGIES)]
    requests = [engine.add_request(*job) for job in jobs]
    countdown = iter(range(100))
    failed = break_runs(engine, lambda request: request is requests[-1] and next(countdown) % 7 == 3, after=True)
    finish(engine)
    assert failed[0] > 1
    for request, job in zip(requests[:-1], jobs, strict=False):
        assert request.output_ids == alone(*job), job[2]


def test_a_failing_schedule_ends_the_one_it_belongs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    good = [engine.add_request(prompt(30, n), PARAMS, "h2o(heavy=6, recent=5)") for n in range(3)]
    bad = engine.add_request(prompt(30, 9), PARAMS, "full")
    extend = engine.store.try_extend

    def breaking(seq, *rest):
        if bad.seq is seq and len(bad.tokens) > 32:
            raise BrokenError
        return extend(seq, *rest)

    monkeypatch.setattr(engine.store, "try_extend", breaking)
    finish(engine)
    assert isinstance(bad.error, BrokenError) and len(bad.output_ids) < 10
    for n, request in enumerate(good):
        assert request.output_ids == alone(prompt(30, n), PARAMS, "h2o(heavy=6, recent=5)")
    assert_empty(engine)


def test_a_failing_strategy_ends_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = SnapKV.scores

    def breaking(stage, view):
        if stage.window == 7:
            raise BrokenError
        return scores(stage, view)

    wanted = alone(prompt(40, 1), PARAMS, "snapkv(budget=12, window=6)")
    monkeypatch.setattr(SnapKV, "scores", breaking)
    engine = new_engine()
    good = engine.add_request(prompt(40, 1), PARAMS, "snapkv(budget=12, window=6)")
    bad = [engine.add_request(prompt(n, n), PARAMS, "snapkv(budget=12, window=7)") for n in (30, 40)]
    finish(engine)
    assert [request.finish_reason for request in bad] == [FinishReason.ERROR] * 2
    assert good.output_ids == wanted
    assert_empty(engine)


@pytest.mark.parametrize("where", ["_draw", "advance", "take"])
def test_choosing_and_writing_fail_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    bad = engine.add_request(prompt(20, 1), DRAWN, "full")
    good = engine.add_request(prompt(20, 2), DRAWN, "full")
    from kvatlas.engine import sampler

    target = sampler if where == "_draw" else engine._detokenizer
    original = getattr(target, where)

    def breaking(*given, **named):
        breaks = len(bad.output_ids) >= 3
        if where == "_draw":  # of all rows at once
            rows = [row for row, request in enumerate(given[1]) if breaks and request is bad]
            return original(*given) | dict.fromkeys(rows, BrokenError())
        if bad in given and breaks:
            raise BrokenError
        return original(*given, **named)

    monkeypatch.setattr(target, where, breaking)
    finish(engine)
    assert isinstance(bad.error, BrokenError) and len(bad.output_ids) in (3, 4)
    assert good.output_ids == alone(prompt(20, 2), DRAWN, "full") and engine.scheduler.num_swaps == 0
    assert_empty(engine)


def test_ctrl_c_leaves_the_others_right() -> None:
    engine = new_engine()
    requests = [engine.add_request(prompt(30, n), PARAMS, strategy) for n, strategy in enumerate(STRATEGIES)]
    run, steps = engine._runner.run, iter(range(100))

    def interrupted(batch):
        done = run(batch)
        if next(steps) == 5:
            raise KeyboardInterrupt
        return done

    engine._runner.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        finish(engine)
    finish(engine)
    for n, request in enumerate(requests):
        assert request.output_ids == alone(prompt(30, n), PARAMS, STRATEGIES[n]), STRATEGIES[n]
    assert_empty(engine)


BOMBED = ("engine.py", "sampler.py", "detokenizer.py", "drafts.py", "request.py")


@contextmanager
def bomb(engine: Engine, at: int) -> Iterator[list[bool]]:
    """Press Ctrl-C at the ``at``-th line that choosing and giving tokens passes; yields whether it went off."""
    run, passed, went_off = engine._runner.run, itertools.count(), []

    def on_line(frame, event, _):
        inside = frame.f_code.co_filename.rsplit("/", 1)[-1] in BOMBED and frame.f_code.co_name not in (
            "undo",
            "_recover",
        )
        if not inside or went_off:
            return None
        if event == "line" and next(passed) == at:
            went_off.append(True)
            raise KeyboardInterrupt
        return on_line

    def traced(batch):
        done = run(batch)
        frame = sys._getframe(1)
        frame.f_trace = on_line
        sys.settrace(on_line)
        return done

    engine._runner.run = traced
    try:
        yield went_off
    finally:
        sys.settrace(None)
        engine._runner.run = run


@pytest.mark.parametrize("at", [*range(0, 180, 13), *range(180, 2000, 260)])
def test_ctrl_c_between_a_token_and_its_acceptance_changes_nothing(at: int) -> None:
    engine = new_engine(max_batched_tokens=512)
    stopping = SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.9, seed=5, stop=["zzz"])
    jobs = [(prompt(12 + n, n), (DRAWN, stopping, PARAMS)[n % 3], STRATEGIES[n % 2]) for n in range(4)]
    with bomb(engine, at) as went_off:
        requests = [engine.add_request(*job) for job in jobs]
        for request in requests:
            request.unread = deque()
        with pytest.raises(KeyboardInterrupt):
            finish(engine)
    finish(engine)
    assert went_off
    for request, job in zip(requests, jobs, strict=True):
        assert request.output_ids == alone(*job), job[2]
        assert [new.token_id for new in request.unread] == request.output_ids
        assert len(request.token_times_s) == len(request.output_ids)
        assert "".join(new.text for new in request.unread) == request.text
    assert_empty(engine)


def test_cancelling_frees_what_an_interrupted_end_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    request = engine.add_request(prompt(12, 1), SamplingParams(max_tokens=3, ignore_eos=True))
    release, pressed = engine.scheduler.release, iter([True])

    def interrupted(request):
        if next(pressed, False):
            raise KeyboardInterrupt
        release(request)

    monkeypatch.setattr(engine.scheduler, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(engine)
    assert request.finish_reason is None and len(request.output_ids) == 2
    engine.cancel(request)
    assert request.finish_reason is FinishReason.CANCELLED and not engine.has_work
    assert_empty(engine)


def test_a_score_interrupted_is_the_same_score() -> None:
    jobs = [ScoreJob(context=tuple(prompt(20, n)), continuation=tuple(prompt(6, 50 + n))) for n in range(3)]
    wanted = score(new_engine(), jobs, "full")
    engine = new_engine(isolate_failures=False)
    with bomb(engine, 60), pytest.raises(KeyboardInterrupt):
        score(engine, jobs, "full")
    assert score(engine, jobs, "full") == wanted


@pytest.mark.parametrize("running", [1, 3])
@pytest.mark.parametrize("where", ["open", "adopt", "layout"])
def test_who_cannot_be_started_ends_alone(running: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()
    good = [engine.add_request(prompt(30, n), DRAWN, "h2o(heavy=6, recent=5)") for n in range(running)]
    while len(good[-1].output_ids) < 2:
        engine.step()
    caches = [request.seq for request in good]
    bad = engine.add_request(prompt(30, 9), PARAMS, "full")

    def breaking(*given, **named):
        raise BrokenError

    target = engine.scheduler._prefix_cache if where == "adopt" else engine.store
    with monkeypatch.context() as patch:
        patch.setattr(target, where, breaking)
        engine.step()
    assert isinstance(bad.error, BrokenError) and bad.finish_reason is FinishReason.ERROR
    assert [request.seq for request in good] == caches, "no other cache is made anew"
    finish(engine)
    assert [request.output_ids for request in good] == [
        alone(prompt(30, n), DRAWN, "h2o(heavy=6, recent=5)") for n in range(running)
    ]
    assert_empty(engine)


def test_a_cache_that_cannot_be_swapped_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(kv_memory="1200KiB")
    jobs = [(prompt(40, n), DRAWN, "h2o(heavy=24, recent=24)") for n in range(12)]
    requests = [engine.add_request(*job) for job in jobs]

    def breaking(seq):
        raise BrokenError

    monkeypatch.setattr(engine.scheduler._swapper, "try_swap_out", breaking)
    for _ in range(6):
        engine.step()
    engine.scheduler._preempt(engine.scheduler.running[0])
    finish(engine)
    assert engine.scheduler.num_swaps == 0 and sum(request.num_preemptions for request in requests)
    for request, job in zip(requests, jobs, strict=True):
        assert request.error is None and request.output_ids == alone(*job)
    assert_empty(engine)


def test_cancelled_while_suspected() -> None:
    engine = new_engine(max_batched_tokens=512)
    requests = [engine.add_request(prompt(30, n), PARAMS) for n in range(3)]
    broken = iter([True])
    break_runs(engine, lambda request: next(broken, False), after=True)
    engine.step()
    assert engine.has_work and not engine.scheduler.running
    engine.cancel(requests[1])
    finish(engine)
    assert [request.finish_reason for request in requests] == ["length", "cancelled", "length"]
    assert_empty(engine)


# What callers see


def test_generate_finishes_the_others_and_then_says_so() -> None:
    llm = LLM(MODEL, kv_memory="4MiB")
    break_runs(llm.engine, lambda request: request.output_start == 21 and len(request.tokens) > 24, after=True)
    with pytest.raises(
        RequestError, match=r"^request-1 failed after 4 output tokens: BrokenError: request-1$"
    ) as raised:
        llm.generate([prompt(20, 1), prompt(21, 2), prompt(22, 3)], PARAMS)
    outputs = raised.value.outputs
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert list(outputs[0].outputs[0].token_ids) == alone(prompt(20, 1), PARAMS, "full")
    assert isinstance(raised.value.__cause__, BrokenError)
    assert len(llm.generate(prompt(20, 1), PARAMS)[0].outputs[0].token_ids) == 10
    assert_empty(llm.engine)


def test_streams_sessions_and_scores_raise_too() -> None:
    llm = LLM(MODEL, kv_memory="4MiB")
    break_runs(llm.engine, lambda request: request.computed > 24, after=False)
    with pytest.raises(RequestError, match="BrokenError"):
        list(llm.stream(prompt(20, 1), PARAMS))
    with llm.session() as session, pytest.raises(RequestError, match="BrokenError"):
        session.generate(prompt(20, 1), PARAMS)
    with pytest.raises(RequestError, match="BrokenError"):
        score(llm.engine, [ScoreJob(context=tuple(prompt(20, 1)), continuation=tuple(prompt(9, 2)))], "full")
    assert_empty(llm.engine)


@pytest.mark.parametrize("where", ["run", "_draw"])
def test_a_measurement_is_told_at_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point of an experiment must fail rather than hold what was left of its requests."""
    from kvatlas.engine import sampler

    engine = new_engine(isolate_failures=False)
    requests = [engine.add_request(prompt(20, n), DRAWN) for n in range(3)]
    engine.step()
    if where == "run":
        broken = iter([True])
        break_runs(engine, lambda request: next(broken, False), after=True)
    else:
        draw = sampler._draw

        def breaking(logits, due):
            return draw(logits, due) | {row: BrokenError() for row, each in enumerate(due) if each is requests[1]}

        monkeypatch.setattr(sampler, "_draw", breaking)
    with pytest.raises(BrokenError):
        engine.step()
    finish(engine)
    left = [requests[0], requests[2]] if where == "_draw" else requests
    assert [request.output_ids for request in left] == [
        alone(prompt(20, requests.index(request)), DRAWN, "full") for request in left
    ]
    assert_empty(engine)


def test_end_tokens_that_the_head_does_not_have_are_ignored() -> None:
    config = MODEL.adapter.model.generation_config
    before, size = config.eos_token_id, MODEL.adapter.shape.vocab_size
    try:
        for named, wanted in (([2, size], {2}), (-1, set()), ([-1, 10**9, 1], {1}), (None, set()), (2.5, set())):
            config.eos_token_id = named
            engine = new_engine()
            assert engine._end_ids == wanted
            request = engine.add_request(prompt(9, 1), SamplingParams(max_tokens=4, min_tokens=4))
            finish(engine)
            assert request.finish_reason is FinishReason.LENGTH
    finally:
        config.eos_token_id = before


def test_what_is_refused_has_not_touched_the_engine() -> None:
    engine = new_engine()
    good = engine.add_request(prompt(30, 1), DRAWN)
    engine.step()
    size = MODEL.adapter.shape.vocab_size
    for ids in ([], [size], [-1], [1.0], [True], None, "text", [[1, 2]], [None], [10**30]):
        with pytest.raises(ConfigError):
            engine.add_request(ids, PARAMS)
    for params in ({"max_tokens": 3}, {}, 0, 16, "greedy"):
        with pytest.raises(ConfigError, match="SamplingParams"):
            engine.add_request(prompt(3, 1), params)
    with pytest.raises(CapacityError):
        engine.add_request(prompt(3, 1), SamplingParams(max_tokens=10**15))
    finish(engine)
    assert good.output_ids == alone(prompt(30, 1), DRAWN, "full")
