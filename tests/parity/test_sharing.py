"""Equal prompts are computed once: by strategies that round, that read less, and that cut what they were given.

What is compared is the answer with the prefix cache and without it; what is counted are the prompt tokens that went
through the model.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import pytest
from tests.driving import assert_empty, check, finish, loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import CapacityError
from kvatlas.core.observer import Counter, Observer
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.models.loading import LoadedModel
from kvatlas.storage import eviction

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPT = 83
SHARING = (
    "full", "int8", "bf16", "fp16", "quest(budget=24, dense=1)", "snapkv(budget=0.25, window=8)",
    "knorm(budget=0.25)", "tova(budget=0.25)", "snapkv(budget=0.25, window=8) | ada", "offload(host)",
    "snapkv(budget=0.25, window=8) | pyramid", "snapkv(budget=0.25, window=8) | int8",
    "snapkv(budget=20, window=8) | offload(host)", "snapkv(budget=0.25, window=8, layers=1-)",
)  # fmt: skip
ALONE = ("h2o", "streaming_llm", "kivi(residual=32)", "infinigen", "h2o | int8", "h2o(layers=0)")


@cache
def model(family: str = "llama") -> LoadedModel:
    return loaded(tiny_model(family))


def ids(length: int = PROMPT, seed: int = 0) -> list[int]:
    return token_ids(length, seed=seed)[0].tolist()


def engine_of(family: str = "llama", **options) -> Engine:
    small = {"kv_memory": "8MiB", "host_memory": "8MiB", "max_batched_tokens": 24, "block_size": 4}
    return Engine(model(family), **{**small, **options})


def run(engine: Engine, prompt: list[int], strategy: str) -> Request:
    request = engine.add_request(prompt, GREEDY, strategy)
    finish(engine)
    assert request.error is None, request.error
    return request


class Counts(Observer):
    """Adds up what is counted."""

    def __init__(self) -> None:
        self.total: collections.Counter[Counter] = collections.Counter()

    def count(self, counter, n):
        self.total[counter] += n() if callable(n) else n


def computed_in_prompts(engine: Engine) -> Callable[[], int]:
    """Return a function that says how many prompt tokens have been computed from now on."""
    engine.observer = counts = Counts()
    return lambda: counts.total[Counter.PROMPT_TOKENS]


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
@pytest.mark.parametrize("strategy", SHARING)
def test_a_known_prompt_is_not_computed_again(strategy: str, family: str) -> None:
    if family == "gemma4_text" and "quest" in strategy:
        pytest.skip("its tiny form has no layer without a window behind the dense ones")
    wanted = run(engine_of(family, enable_prefix_caching=False), ids(), strategy).output_ids
    engine = engine_of(family)
    first, second, longer = (run(engine, each, strategy) for each in (ids(), ids(), [*ids(), *ids(20, seed=1)]))
    assert first.adopted_tokens == 0
    assert second.adopted_tokens >= PROMPT - 12 and longer.adopted_tokens >= PROMPT - 12
    assert first.output_ids == second.output_ids == wanted
    fresh = engine_of(family, enable_prefix_caching=False)
    assert longer.output_ids == run(fresh, [*ids(), *ids(20, seed=1)], strategy).output_ids
    assert_empty(engine)


@pytest.mark.parametrize("strategy", ALONE)
def test_what_depends_on_its_own_queries_is_not_shared(strategy: str) -> None:
    size = 32 if "kivi" in strategy else 4
    engine = engine_of(block_size=size)
    run(engine, ids(), "full")
    wanted = run(engine_of(enable_prefix_caching=False, block_size=size), ids(), strategy).output_ids
    again = [run(engine, ids(), strategy) for _ in range(2)]
    assert [request.adopted_tokens for request in again] == [0, 0]
    assert [request.output_ids for request in again] == [wanted] * 2


SIX = [
    "snapkv(budget=0.25, window=8)", "full", "knorm(budget=0.25)", "tova(budget=0.25)", "quest(budget=24, dense=1)",
    "snapkv(budget=0.5, window=8) | ada",
]  # fmt: skip


@pytest.mark.parametrize("first", range(len(SIX)))
def test_one_prompt_under_six_strategies_is_prefilled_once(first: int) -> None:
    """Whoever comes first, also one that cuts: what it leaves to the others is the whole prompt."""
    order, engine = SIX[first:] + SIX[:first], engine_of()
    count = computed_in_prompts(engine)
    answers = {strategy: run(engine, ids(), strategy).output_ids for strategy in order}
    assert count() < PROMPT + 12 * len(SIX), "beside the first, each computes less than two blocks"
    for strategy in order:
        assert answers[strategy] == run(engine_of(enable_prefix_caching=False), ids(), strategy).output_ids, strategy
    assert_empty(engine)


@pytest.mark.parametrize("strategy", ["snapkv(budget=0.25, window=8)", "knorm(budget=0.5) | ada", "tova(budget=0.25)"])
def test_where_memory_is_short_the_cache_gives_way_to_the_cut(strategy: str) -> None:
    """Copy on cut needs room for what is kept; without it, the prompt's entries are given up and it is cut in place."""
    whole = engine_of().footprint(engine_of().add_request(ids(), GREEDY, strategy).strategy, PROMPT, 8).peak_bytes
    wanted = run(engine_of(enable_prefix_caching=False), ids(), strategy).output_ids
    slab = engine_of().store.arena.slab_bytes
    for memory in range(whole, whole + 6 * slab, slab):
        engine = engine_of(kv_memory=memory)
        try:
            requests = [engine.add_request(ids(), GREEDY, strategy) for _ in range(3)]
        except Exception:
            continue
        finish(engine)
        assert [request.output_ids for request in requests] == [wanted] * 3
        assert_empty(engine)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_where_making_room_takes_what_was_to_be_adopted(family: str) -> None:
    """Entries may be given up for the copies of others; what is left of them is adopted, and nobody fails."""
    for strategy in ("snapkv(budget=20, window=4)", "tova(budget=20)"):
        wanted = run(engine_of(family, enable_prefix_caching=False, block_size=8), ids(), strategy).output_ids
        for kib in range(17, 120, 9):
            engine = engine_of(family, block_size=8, kv_memory=f"{kib}KiB")
            try:
                run(engine, ids(), "full")
                assert run(engine, ids(), strategy).output_ids == wanted, kib
            except CapacityError:
                continue
            assert_empty(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_cut_that_breaks_off_loses_no_block(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, broken, move = engine_of(), iter([True]), eviction.move_slots
    requests = [engine.add_request(ids(), GREEDY, "snapkv(budget=20, window=4)") for _ in range(2)]

    def breaking(*given):
        if next(broken, False):
            raise error
        move(*given)

    monkeypatch.setattr(eviction, "move_slots", breaking)
    with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else nullcontext():
        finish(engine)
    finish(engine)
    wanted = run(engine_of(enable_prefix_caching=False), ids(), "snapkv(budget=20, window=4)").output_ids
    assert all(request.output_ids == wanted for request in requests if request.error is None)
    assert_empty(engine)


def test_tokens_written_to_evicted_slots_reach_nobody_else() -> None:
    """A prompt within the budget is not cut, but its slots are given to later tokens: the cache must not keep them."""
    engine, long = engine_of(), SamplingParams(max_tokens=40, ignore_eos=True)
    engine.add_request(ids(), long, "tova(budget=90)")
    finish(engine)
    for strategy in ("tova(budget=90)", "full", "knorm(budget=40)"):
        wanted = run(engine_of(enable_prefix_caching=False), ids(), strategy).output_ids
        assert run(engine, ids(), strategy).output_ids == wanted, strategy
    assert_empty(engine)


def test_requests_that_come_together_share_too() -> None:
    engine = engine_of(max_batched_tokens=32)
    requests = [engine.add_request(ids(), GREEDY, strategy) for strategy in (*SIX, *SIX)]
    finish(engine)
    for request in requests:
        wanted = run(engine_of(enable_prefix_caching=False), ids(), str(request.strategy)).output_ids
        assert request.output_ids == wanted, request.strategy
    check(engine)
    assert_empty(engine)


@pytest.mark.parametrize("strategy", ["int8", "bf16", "full"])
def test_a_preempted_request_is_computed_as_one_prompt(strategy: str) -> None:
    engine = engine_of(host_memory=0, enable_prefix_caching=False)
    request = engine.add_request(ids(), SamplingParams(max_tokens=24, ignore_eos=True), strategy)
    while len(request.output_ids) < 20:
        engine.step()
    engine.scheduler._preempt(request)
    count = computed_in_prompts(engine)
    known = len(request.tokens)
    finish(engine)
    assert count() == known and request.num_preemptions == 1
    fresh = engine_of(enable_prefix_caching=False)
    whole = fresh.add_request(ids(), SamplingParams(max_tokens=24, ignore_eos=True), strategy)
    finish(fresh)
    assert request.output_ids == whole.output_ids


@pytest.mark.parametrize("strategy", ["int8", "bf16", "quest(budget=24, dense=1)"])
def test_forks_of_what_rounds_or_reads_less(strategy: str) -> None:
    from kvatlas.engine.llm import LLM

    llm = LLM(model(), kv_memory="8MiB", max_batched_tokens=24, block_size=4)
    with llm.session(strategy=strategy) as session:
        session.generate(ids(60), GREEDY)
        with session.fork() as child:
            answers = [one.generate(ids(20, seed=3), GREEDY).outputs[0].token_ids for one in (child, session)]
    with llm.session(strategy=strategy) as alone:
        alone.generate(ids(60), GREEDY)
        wanted = alone.generate(ids(20, seed=3), GREEDY).outputs[0].token_ids
    assert answers == [wanted, wanted]
    assert_empty(llm.engine)
