"""Scores of continuations: those of transformers where nothing is cut, those of the decode steps where something is."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tests.driving import Job, drive, loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import CapacityError, ConfigError
from kvatlas.engine.engine import Engine
from kvatlas.engine.scoring import Score, ScoreJob, score
from kvatlas.models.loading import LoadedModel, load_model

TOLERANCE = 1e-3
CUTTING = ("streaming_llm(sinks=2, recent=9)", "h2o(heavy=5, recent=4)", "snapkv(budget=9, window=4)")
LENGTHS = ((1, 5), (2, 1), (23, 4), (60, 9), (37, 1), (40, 30))


@cache
def model(family: str = "llama") -> tuple[LoadedModel, torch.nn.Module]:
    """Return a tiny model that engines run, and the same model with transformers' own attention."""
    own = tiny_model(family)
    return loaded(copy.deepcopy(own)), own


def engine(family: str = "llama", **options) -> Engine:
    return Engine(model(family)[0], **{"kv_memory": "4MiB", "block_size": 4, "max_batched_tokens": 16, **options})


@cache
def jobs() -> tuple[ScoreJob, ...]:
    rows = [(token_ids(sum(pair), seed=seed)[0].tolist(), pair[0]) for seed, pair in enumerate(LENGTHS)]
    return tuple(ScoreJob(context=tuple(ids[:cut]), continuation=tuple(ids[cut:])) for ids, cut in rows)


def by_transformers(own: torch.nn.Module, job: ScoreJob) -> Score:
    ids = torch.tensor([[*job.context, *job.continuation]])
    with torch.inference_mode():
        rows = own(ids).logits[0, len(job.context) - 1 : -1].float().log_softmax(dim=-1)
    wanted = torch.tensor(job.continuation)
    return Score(
        logprobs=tuple(rows.gather(1, wanted[:, None])[:, 0].tolist()),
        is_greedy=bool((rows.argmax(dim=-1) == wanted).all()),
    )


def assert_equal(got: list[Score], wanted: list[Score], tolerance: float = TOLERANCE) -> None:
    assert [one.is_greedy for one in got] == [one.is_greedy for one in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("held_back", [0, 1])
def test_full_scores_as_transformers_does(family, held_back):
    wanted = [by_transformers(model(family)[1], job) for job in jobs()]
    assert_equal(score(engine(family), jobs(), "full", held_back=held_back), wanted)


def test_the_bundled_model_scores_as_transformers_does():
    bundled = load_model(None)
    tokenizer = bundled.tokenizer
    assert tokenizer is not None
    pairs = (
        ("Return the number of", " items in the list."),
        ("def add(", "a, b)"),
        (" Maria 4 8 2 1.\nQuestion: Maria", " 4 8 2 1"),
    )
    wanted_jobs = [
        ScoreJob(context=tuple(tokenizer(context)["input_ids"]), continuation=tuple(tokenizer(rest)["input_ids"]))
        for context, rest in pairs
    ]
    got = score(Engine(bundled, kv_memory="16MiB"), wanted_jobs, "full")
    own = copy.deepcopy(bundled.adapter.model)
    own.set_attn_implementation("sdpa")
    assert_equal(got, [by_transformers(own, job) for job in wanted_jobs])
    assert got[2].is_greedy  # it was made to look facts up


def test_a_greedy_continuation_is_called_so():
    own = model()[1]
    ids = token_ids(20, seed=3)[0][None]
    with torch.inference_mode():
        best = int(own(ids).logits[0, -1].argmax())
    found = score(
        engine(),
        [ScoreJob(context=tuple(ids[0].tolist()), continuation=(token,)) for token in (best, best - 1)],
        "full",
    )
    assert [one.is_greedy for one in found] == [True, False]


@pytest.mark.parametrize(
    "strategy", ["h2o(heavy=64, recent=64)", "snapkv(budget=128, window=4)", "full | offload(host)"]
)
def test_a_budget_that_holds_everything_scores_as_full(strategy):
    assert_equal(score(engine(), jobs(), strategy), score(engine(), jobs(), "full"))


@pytest.mark.parametrize("strategy", ["full", "infinigen", *CUTTING])
def test_together_as_one_by_one(strategy):
    alone = [score(engine(), [job], strategy)[0] for job in jobs()]
    assert_equal(score(engine(), jobs(), strategy), alone)


@pytest.mark.parametrize("host_memory", ["0", "1MiB"])
@pytest.mark.parametrize("strategy", ["full", *CUTTING])
def test_requests_that_lose_their_cache_score_alike(strategy, host_memory, monkeypatch):
    """Computed anew, replayed or swapped: no token is noted twice, and none changes."""
    many = jobs()
    busy = engine(enable_prefix_caching=False, host_memory=host_memory)
    interrupt(busy, monkeypatch)
    finished: list[int] = []
    got = score(busy, many, strategy, on_finished=finished.append)
    assert_equal(got, score(engine(), many, strategy))
    assert sum(finished) == len(many)
    assert not busy.has_work
    assert busy.store.books().used == 0


@pytest.mark.parametrize("strategy", ["full | offload(host)", "infinigen"])
def test_requests_that_lose_their_cache_on_the_host_score_alike(strategy, monkeypatch):
    many = jobs()
    busy = engine(enable_prefix_caching=False, host_memory="1MiB")
    interrupt(busy, monkeypatch)
    assert_equal(score(busy, many, strategy), score(engine(), many, strategy))


def interrupt(busy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one running request after the other lose its cache, every third step of the first hundred."""
    step, steps = busy.step, 0

    def interrupted_step():
        nonlocal steps
        news, steps = step(), steps + 1
        running = busy.scheduler.running
        if running and steps % 3 == 0 and steps < 100:
            busy.scheduler._preempt(running[steps // 3 % len(running)])
        return news

    monkeypatch.setattr(busy, "step", interrupted_step)


@pytest.mark.parametrize("strategy", CUTTING)
def test_without_holding_back_it_scores_what_generation_would(strategy):
    """Compared with the logits of forced outputs, gathered by a driver that knows nothing of scoring."""
    driven = [Job(job.context, job.continuation, strategy) for job in jobs()]
    drive(engine(), driven)
    for got, job in zip(score(engine(), jobs(), strategy, held_back=0), driven, strict=True):
        rows = torch.stack(job.logits).float().log_softmax(dim=-1)
        assert got.logprobs == pytest.approx(
            [float(row[token]) for row, token in zip(rows, job.outputs, strict=True)], abs=TOLERANCE
        )


@pytest.mark.parametrize("strategy", CUTTING[1:])
def test_held_back_the_first_token_depends_on_the_strategy(strategy):
    """H2O and SnapKV cut after the prompt: the first token comes from before the cut unless it is held back."""
    one = [ScoreJob(context=job.context, continuation=job.continuation[:1]) for job in jobs() if len(job.context) > 20]
    full = [got.logprob for got in score(engine(), one, "full")]
    assert [got.logprob for got in score(engine(), one, strategy, held_back=0)] == pytest.approx(full, abs=TOLERANCE)
    held = [got.logprob for got in score(engine(), one, strategy)]
    assert all(abs(a - b) > 10 * TOLERANCE for a, b in zip(held, full, strict=True))


def test_the_sum_is_the_logprob():
    (got,) = score(engine(), jobs()[2:3], "full")
    assert len(got.logprobs) == 4
    assert got.logprob == pytest.approx(sum(got.logprobs))
    assert all(each < 0 for each in got.logprobs)


def test_bad_jobs_are_refused_and_nothing_keeps_running():
    busy = engine()
    good = jobs()[2]
    for bad, error in (
        (ScoreJob(context=(1, 2), continuation=()), ConfigError),
        (ScoreJob(context=(), continuation=(1,)), ConfigError),
        (ScoreJob(context=(1,), continuation=(10_000,)), ConfigError),
        (ScoreJob(context=(1,) * 120, continuation=(1,) * 9), CapacityError),
    ):
        with pytest.raises(error):
            score(busy, [good, bad], "full")
        assert not busy.has_work
    for wrong in (-1, 1.0, True, None):
        with pytest.raises(ConfigError, match=f"held_back is {wrong}"):
            score(busy, [good], "full", held_back=wrong)
    assert score(busy, [], "full") == []


@pytest.mark.parametrize("name", ["context", "continuation"])
def test_a_job_is_token_ids_of_any_form(name):
    for ids in ([3, 5], (3, 5), torch.tensor([3, 5]), iter([3, 5])):
        assert ScoreJob(**{"context": (1,), "continuation": (1,), name: ids}) == ScoreJob(
            **{"context": (1,), "continuation": (1,), name: (3, 5)}
        )
    for wrong in ([3.0], [None], [-1], [True], "35", None, [[3]]):
        with pytest.raises(ConfigError, match=f"the {name} "):
            ScoreJob(**{"context": (1,), "continuation": (1,), name: wrong})
