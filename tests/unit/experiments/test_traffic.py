import math

import pytest

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.experiments.traffic import arrivals_name, burstiness_of, drawn_traffic, load_trace, trace_traffic
from kvatlas.workloads.excerpts import EXCERPT_NAMES

TRACE = {
    "trace": "mooncake-conversation",
    "requests": 4,
    "time_scale": 0.5,
    "length_scale": 0.01,
    "max_prompt_tokens": 40,
}
EVERY = (1.0, 0.25, 1e-7, 3e8, 30.0, math.inf)
DRAWN = {"arrivals": "poisson", "rate": 4.0, "requests": 8, "prompt_tokens": 16, "output_tokens": 3}


def test_a_trace_gives_equal_requests_for_equal_seeds():
    first, again, other = (trace_traffic(TRACE, 100, seed) for seed in (3, 3, 4))
    assert first == again
    assert [one.prompt_ids for one in first] != [one.prompt_ids for one in other]
    assert [one.at_s for one in first] == [one.at_s for one in other]
    assert len(first) == 4
    assert max(len(one.prompt_ids) for one in first) <= 40


def test_drawn_requests_have_one_length_and_unrelated_prompts():
    first, again, other = (drawn_traffic(DRAWN, 100, seed) for seed in (3, 3, 4))
    assert first == again
    assert first[0].prompt_ids != other[0].prompt_ids
    assert {(len(one.prompt_ids), one.output_tokens) for one in first} == {(16, 3)}
    assert len({tuple(one.prompt_ids) for one in first}) == 8
    assert max(max(one.prompt_ids) for one in first) < 100
    assert first[-1].at_s == pytest.approx(2.0)


def test_burstiness_has_a_name():
    assert [arrivals_name(value) for value in (1.0, 0.25)] == ["poisson", "gamma 0.25"]
    assert [burstiness_of(arrivals_name(value)) for value in EVERY] == list(EVERY)
    with pytest.raises(ConfigError, match="'gama 2' are not understood; write poisson"):
        burstiness_of("gama 2")


def test_a_trace_is_an_excerpt_or_a_file():
    assert [load_trace(name).name for name in EXCERPT_NAMES] == list(EXCERPT_NAMES)
    with pytest.raises(TraceError, match="trace gone"):
        load_trace("gone.jsonl")
