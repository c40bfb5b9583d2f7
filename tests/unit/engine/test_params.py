"""Sampling parameters: every field by type and range, whatever kind of number it comes as."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from kvatlas.core.errors import ConfigError, UnknownNameError
from kvatlas.engine.params import GREEDY_BELOW, SamplingParams

COUNTS = ("max_tokens", "min_tokens", "top_k", "seed")
REALS = ("temperature", "top_p")
FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**30, 10**400, 10**5000, -(10**5000)]),
    st.floats(),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.lists(st.one_of(st.integers(-3, 9), st.floats(), st.text(max_size=2), st.none(), st.booleans()), max_size=3),
    st.sampled_from(
        [
            *(np.float32(0.5), np.int64(3), np.bool_(True), np.array(3), np.array([3, 5]), np.array([[3]])),
            *(torch.tensor(3), torch.tensor(0.5), torch.tensor(math.nan), torch.tensor(True), torch.tensor([3])),
            *(torch.zeros(2, 3), np.datetime64(0, "s"), np.timedelta64(3, "ns"), np.str_("a"), np.array([0.5])),
            *({3}, {"a": 1}, Path("a"), object(), int, ..., SamplingParams, range(3)),
        ]
    ),
)


@given(st.dictionaries(st.sampled_from(FIELDS), odd, max_size=3))
def test_anything_is_understood_or_refused_in_one_line_that_names_it(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values)
    except ConfigError as error:
        message = str(error)
        assert any(name in message or name.replace("_", " ") in message for name in (*values, "stop string"))
        assert message.isprintable() and len(message) < 300
        return
    for name in COUNTS:
        assert type(getattr(params, name)) in (int, type(None)), name
    assert all(type(getattr(params, name)) is float for name in REALS)
    assert all(type(token) is int and token >= 0 for token in params.stop_token_ids)
    assert all(type(text) is str and text for text in params.stop)
    assert params.temperature == 0 or GREEDY_BELOW <= params.temperature < math.inf
    assert 0 < params.top_p <= 1 and 0 <= params.min_tokens <= params.max_tokens
    assert hash(params) == hash(copy.copy(params)) and pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params) == params


@pytest.mark.parametrize("make", [np.int64, np.uint8, np.array, torch.tensor, int])
def test_whole_numbers_of_any_make_are_pythons(make: Any) -> None:
    five, two, three, seven, four, one = map(make, (5, 2, 3, 7, 4, 1))
    params = SamplingParams(
        max_tokens=five, min_tokens=two, top_k=three, seed=seven, stop_token_ids=[four], temperature=one, top_p=one
    )
    assert params == SamplingParams(
        max_tokens=5, min_tokens=2, top_k=3, seed=7, stop_token_ids=(4,), temperature=1.0, top_p=1.0
    )


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(
    "wrong", [True, 2.0, 2.5, "3", math.nan, np.float64(2), np.bool_(True), torch.tensor(2.0), [3]]
)
def test_a_count_is_a_whole_number(name: str, wrong: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number from "):
        SamplingParams(**{name: wrong})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 2**63 - 1, got 0"),
        ({"max_tokens": None}, "max_tokens must be a whole number from 1 to 2**63 - 1, got None"),
        ({"max_tokens": 10**5000}, "got a whole number of 16610 bits"),
        ({"min_tokens": -1}, "min_tokens must be a whole number from 0"),
        ({"min_tokens": 17}, "min_tokens=17 exceeds max_tokens=16; lower it"),
        ({"temperature": -0.1}, "temperature must be a finite number from 0 to 3.4e+38, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": 10**400}, "temperature must be a finite number from 0 to 3.4e+38, got a whole number of 1329"),
        ({"temperature": 1e300}, "temperature must be a finite number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": "0.5"}, "temperature must be a number from 0 to 3.4e+38, got '0.5'"),
        ({"temperature": None}, "temperature must be a number"),
        ({"top_k": -2}, "top_k must be a whole number from 0 to 2**63 - 1; 0 and -1 are all tokens, got -2"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be a number above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "top_p"),
        ({"seed": 2**63}, "seed must be a whole number from -2**63 to 2**63 - 1, got 9223372036854775808"),
        ({"stop": ""}, "a stop string is empty"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"stop": b"a"}, "stop must be a string or a list of strings, got b'a'"),
        ({"stop": [b"a"]}, "stop holds b'a', which is no string"),
        ({"stop": 3}, "stop must be a string or a list of strings, got 3"),
        ({"stop": {"a": 1}}, "stop must be a string or a list of strings"),
        ({"stop": "a\ud800"}, "a stop string has '\\ud800' at character 1, half of a surrogate pair"),
        ({"stop_token_ids": [3, True]}, "stop_token_ids holds True as token 1"),
        ({"stop_token_ids": [3.0]}, "stop_token_ids holds 3.0 as token 0"),
        ({"stop_token_ids": -1}, "stop_token_ids holds -1 as token 0"),
        ({"stop_token_ids": "3"}, "stop_token_ids is '3'; give token ids in a list"),
        ({"stop_token_ids": b"3"}, "stop_token_ids is b'3'; give token ids in a list"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"ignore_eos": None}, "ignore_eos must be True or False, got None"),
        ({"n": 2}, "the sampling parameter 'n' is not supported yet; leave it out"),
        ({"logit_bias": {3: 1.0}}, "the sampling parameter 'logit_bias' is not supported yet; leave it out"),
        ({"presence_penalty": 0.0}, "the sampling parameter 'presence_penalty' is not supported yet; leave it out"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        SamplingParams(**given)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "here"),
    [("max_new_tokens", "max_tokens"), ("max_completion_tokens", "max_tokens"), ("stop_strings", "stop")],
)
def test_a_name_of_others_is_told_by_ours(name: str, here: str) -> None:
    with pytest.raises(ConfigError, match=f"the sampling parameter '{name}' is called '{here}' here; rename it"):
        SamplingParams(**{name: 3})


@pytest.mark.parametrize("name", ["max_token", "Max_Tokens", "maxtokens"])
def test_a_name_that_is_misspelt_names_the_nearest(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown sampling parameter '{name}'; did you mean 'max_tokens'?"):
        SamplingParams(**{name: 3})


def test_parameters_are_given_by_name() -> None:
    with pytest.raises(ConfigError, match="given by name, got 16; write max_tokens=16"):
        SamplingParams(16)  # type: ignore[call-arg]


def test_none_and_minus_one_mean_what_they_mean_in_vllm() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None, seed=None, top_k=-1) == SamplingParams()
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)
    assert SamplingParams(seed=-2).seed == -2


@pytest.mark.parametrize("tiny", [0, -0.0, 5e-324, 1e-300, 1e-46, 1e-44, 1e-38, 9.9e-6, torch.tensor(1e-20)])
def test_a_tiny_temperature_is_greedy(tiny: float) -> None:
    assert SamplingParams(temperature=tiny) == SamplingParams(temperature=0)


@pytest.mark.parametrize("tiny", [5e-324, 1e-300, 1e-46, 1e-38, 1e-9])
def test_a_tiny_top_p_keeps_the_best_token(tiny: float) -> None:
    top_p = SamplingParams(top_p=tiny).top_p
    assert top_p == pytest.approx(tiny, abs=2e-38)
    assert torch.tensor([0.0]) < top_p, "as float32 it is not 0"


def test_one_stop_string_or_token_needs_no_list_and_lists_of_any_kind_are_understood() -> None:
    both = SamplingParams(stop=("a", "b"), stop_token_ids=(3, 5))
    assert SamplingParams(stop="a", stop_token_ids=3) == SamplingParams(stop=["a"], stop_token_ids=[3])
    for make in (list, set, frozenset, iter, np.array):
        assert SamplingParams(stop=make(["a", "b"]), stop_token_ids=make([3, 5])) == both
    assert SamplingParams(stop=("a", "b"), stop_token_ids=torch.tensor([3, 5])) == both
    assert SamplingParams(stop=("a", "b"), stop_token_ids=range(3, 6, 2)) == both
