"""Windows that score every token once, and the number they come to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from tests.driving import loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.engine.engine import Engine
from kvatlas.evaluation.rolling import (
    TextScore,
    after_context_jobs,
    perplexity,
    refuse_fractions,
    rolling_jobs,
    score_texts,
)
from kvatlas.strategies.strategy import Strategy


def test_windows_of_a_short_text_by_hand():
    jobs = rolling_jobs(range(10), prefix_token=99, longest=5, context_tokens=1)
    assert [(job.context, job.continuation) for job in jobs] == [
        ((99,), (0, 1, 2, 3)),
        ((3,), (4, 5, 6, 7)),
        ((5, 6, 7), (8, 9)),  # as long as the others, with more context
    ]
    assert rolling_jobs([], prefix_token=99, longest=5) == []


@given(length=st.integers(0, 60), longest=st.integers(2, 20), data=st.data())
def test_every_token_is_scored_once_in_place(length, longest, data):
    context = data.draw(st.integers(1, longest - 1))
    jobs = rolling_jobs(range(length), prefix_token=99, longest=longest, context_tokens=context)
    assert [token for job in jobs for token in job.continuation] == list(range(length))
    for number, job in enumerate(jobs):
        assert len(job.context) + len(job.continuation) <= longest
        if number:
            assert job.context == tuple(range(job.continuation[0] - len(job.context), job.continuation[0]))
            assert len(job.context) >= context
            assert len(job.context) + len(job.continuation) == longest


@given(length=st.integers(0, 60), context=st.integers(1, 20), stride=st.integers(1, 20))
def test_after_a_context_every_token_is_scored_once_in_place(length, context, stride):
    jobs = after_context_jobs(range(length), context_tokens=context, stride=stride)
    assert [token for job in jobs for token in job.continuation] == list(range(context, length))
    assert all(len(job.context) == context and job.context[-1] + 1 == job.continuation[0] for job in jobs)
    assert all(len(job.continuation) == stride for job in jobs[:-1])


@pytest.mark.parametrize(("longest", "context"), [(5, 5), (5, 0), (1, 1)])
def test_lengths_that_leave_nothing_are_refused(longest, context):
    with pytest.raises(ConfigError, match=f"context_tokens is {context} in windows of {longest}"):
        rolling_jobs([1], prefix_token=0, longest=longest, context_tokens=context)
    with pytest.raises(ConfigError, match="want at least 1 each"):
        after_context_jobs([1], context_tokens=context, stride=0)


def test_texts_score_as_one_forward_of_transformers_would():
    """One window per text, so that a single forward sees the same context."""
    own = tiny_model("llama")
    ids = token_ids(40, 9, 30, seed=1)
    wanted = []
    with torch.inference_mode():
        for text in ids:
            rows = own(text[None]).logits[0, 9:-1].log_softmax(dim=-1)
            wanted.append(float(rows.gather(1, text[10:, None]).sum()))
    engine = Engine(loaded(own), kv_memory="4MiB", block_size=4)
    got = score_texts(engine, [text.tolist() for text in ids], "full", context_tokens=10, stride=100)
    assert [one.num_tokens for one in got] == [30, 0, 20]
    assert [one.logprob for one in got] == pytest.approx(wanted, abs=1e-3)
    assert perplexity(got) == pytest.approx(math.exp(-sum(wanted) / 50), rel=1e-4)


def test_perplexity_by_hand():
    uniform = TextScore(num_tokens=3, logprob=-3 * math.log(7))
    assert perplexity([uniform, TextScore(num_tokens=0, logprob=0.0)]) == pytest.approx(7)
    with pytest.raises(ConfigError, match="no token was scored"):
        perplexity([TextScore(num_tokens=0, logprob=0.0)])


def test_shares_of_a_prompt_of_one_token_are_refused():
    refuse_fractions(Strategy.parse("h2o(heavy=64, recent=64)"))
    refuse_fractions(Strategy.parse("full"))
    with pytest.raises(UnsupportedError, match=r"keeps heavy=0\.1 of the prompt.*heavy=128"):
        refuse_fractions(Strategy.parse("h2o(heavy=0.1, recent=64)"))
