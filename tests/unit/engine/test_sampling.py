"""Choosing tokens: from logits that a test writes, and through the engine."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.driving import loaded
from tests.families import VOCAB_SIZE, tiny_model, token_ids

from kvatlas.core.errors import ConfigError
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.sampler import sample

LLM_ = LLM(loaded(tiny_model("llama")), kv_memory="1MiB", block_size=4)
PROMPT = token_ids(9)[0].tolist()


def asker(params: SamplingParams, outputs: int = 0):
    generator = torch.Generator().manual_seed(params.seed or 0)
    return SimpleNamespace(params=params, output_ids=[0] * outputs, generator=generator, forced=None)


def draws(logits: list[float], params: SamplingParams, times: int = 300) -> list[int]:
    request = asker(params)
    return [sample(torch.tensor([logits]), [request], frozenset())[0] for _ in range(times)]


rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12)


@given(rows, st.integers(0, 99))
def test_temperature_zero_and_top_1_are_the_best(logits: list[float], seed: int) -> None:
    best = max(logits)
    greedy = sample(torch.tensor([logits]), [asker(SamplingParams())], frozenset())[0]
    single = sample(torch.tensor([logits]), [asker(SamplingParams(temperature=2.0, top_k=1, seed=seed))], frozenset())[
        0
    ]
    narrow = sample(
        torch.tensor([logits]), [asker(SamplingParams(temperature=1.0, top_p=1e-6, seed=seed))], frozenset()
    )[0]
    assert logits[greedy] == logits[single] == logits[narrow] == best


@given(rows, st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_top_k_draws_among_the_k_best(logits: list[float], k: int) -> None:
    worst_allowed = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    drawn = draws(logits, SamplingParams(temperature=1.5, top_k=k, seed=1), times=20)
    assert all(logits[token] >= worst_allowed for token in drawn)


def test_top_p_limits_the_support() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(p) for p in probabilities]
    for top_p, support in ((0.4, {0}), (0.6, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(draws(logits, SamplingParams(temperature=1.0, top_p=top_p, seed=3))) == support


def test_draws_follow_the_probabilities() -> None:
    drawn = draws([math.log(p) for p in (0.7, 0.2, 0.1)], SamplingParams(temperature=1.0, seed=5), times=2000)
    for token, probability in enumerate((0.7, 0.2, 0.1)):
        assert drawn.count(token) / 2000 == pytest.approx(probability, abs=0.04)


def test_rows_have_their_own_parameters() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
    requests = [
        asker(SamplingParams()),
        asker(SamplingParams(min_tokens=1)),
        asker(SamplingParams(min_tokens=1, stop_token_ids=(1,))),
    ]
    assert sample(logits, requests, frozenset({2})) == [2, 1, 0]


def answer(**params) -> tuple[int, ...]:
    return LLM_.generate(PROMPT, SamplingParams(**{"max_tokens": 12, **params}))[0].outputs[0].token_ids


def test_seeds_repeat_and_differ() -> None:
    first = answer(temperature=1.5, seed=7)
    assert first == answer(temperature=1.5, seed=7)
    assert len({answer(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    assert len({answer(temperature=1.5) for _ in range(4)}) > 1
    assert answer(temperature=1.5, seed=7, top_k=1) == answer()


def test_seeds_do_not_depend_on_the_batch() -> None:
    wanted = answer(temperature=1.5, seed=7)
    params = [SamplingParams(max_tokens=12, temperature=1.5, seed=seed) for seed in (3, 7, 9)]
    outputs = LLM_.generate([PROMPT] * 3, params)
    assert outputs[1].outputs[0].token_ids == wanted


def test_end_tokens() -> None:
    """The model's end token is 2; make it come by asking for a token that does."""
    free = answer(ignore_eos=True)
    third = free[2]
    place = free.index(third) + 1
    stopped = LLM_.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(third,)))[0]
    assert stopped.outputs[0].token_ids == free[:place] and stopped.outputs[0].finish_reason == "stop"
    longer = answer(ignore_eos=True, stop_token_ids=(third,), min_tokens=6)
    assert third not in longer[:6]


def test_eos_ends_unless_ignored() -> None:
    end_ids = LLM_.engine._end_ids
    assert end_ids == {2}
    free = answer(ignore_eos=True)
    LLM_.engine._end_ids = frozenset({free[3]})
    try:
        place = free.index(free[3]) + 1
        assert answer() == free[:place]
        assert answer(ignore_eos=True) == free
        assert free[3] not in answer(min_tokens=8)[:8]
    finally:
        LLM_.engine._end_ids = end_ids


@pytest.mark.parametrize("token", [VOCAB_SIZE, 10**12])
def test_stop_tokens_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(ConfigError, match=f"token id {token} is outside the vocabulary of {VOCAB_SIZE} tokens"):
        answer(stop_token_ids=(token,), min_tokens=2)
    assert not LLM_.engine.has_work
