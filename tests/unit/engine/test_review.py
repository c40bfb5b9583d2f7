"""What a review found broken once."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.families import tiny_model

import kvatlas
from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams

SIX = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_memory="16MiB")


def test_streams_side_by_side_lose_nothing(llm: LLM) -> None:
    alone = [list(output.outputs[0].token_ids) for output in llm.generate(["def add(", "class A"], SIX)]
    left, right = llm.stream("def add(", SIX), llm.stream("class A", SIX)
    both = list(zip(left, right, strict=True))
    assert [[pair[side].token_id for pair in both] for side in (0, 1)] == alone


def test_a_call_between_two_tokens_of_a_stream_loses_nothing(llm: LLM) -> None:
    [output] = llm.generate("def add(", SIX)
    stream = llm.stream("def add(", SIX)
    first = next(stream)
    llm.generate("class A", SIX)
    rest = list(stream)
    assert [first.token_id, *(new.token_id for new in rest)] == list(output.outputs[0].token_ids)
    assert first.text + "".join(new.text for new in rest) == output.outputs[0].text


def test_the_stop_string_that_comes_first_in_the_text_ends_it(llm: LLM) -> None:
    text = llm.generate("def add(", SamplingParams(max_tokens=12, ignore_eos=True))[0].outputs[0].text
    early, late = text[2], text[5:7]
    stopped = llm.generate("def add(", SamplingParams(max_tokens=12, ignore_eos=True, stop=(late, early)))[0]
    assert early not in stopped.outputs[0].text and late not in stopped.outputs[0].text


def test_a_tiny_temperature_is_nearly_greedy(llm: LLM) -> None:
    greedy, cold = (
        llm.generate("def add(", SamplingParams(max_tokens=6, ignore_eos=True, temperature=t, seed=0))[0].outputs
        for t in (0.0, 1e-40)
    )
    assert greedy == cold


def test_no_parameters_for_a_prompt_is_an_error(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="0 entries"):
        llm.generate("def add(", [])


def test_attach_reads_the_models_own_generation_config() -> None:
    model = tiny_model("llama")
    model.generation_config.num_beams = 3
    with kvatlas.attach(model), pytest.raises(UnsupportedError, match="beams"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_detach_puts_back_what_others_had_set() -> None:
    model = tiny_model("llama")
    hooked = functools.partial(type(model).forward, model)
    model.forward = hooked
    with kvatlas.attach(model):
        pass
    assert model.forward is hooked and "generate" not in vars(model)
