"""Calls of `LLM` and of its sessions: what they are given is understood or refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.driving import loaded
from tests.unit.engine.vocabularies import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList, StopStringCriteria

from kvatlas.core.errors import CapacityError, ConfigError, KvatlasError, UnknownNameError
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams

TOKENIZER = byte_tokenizer(chat=True)
TWO = SamplingParams(max_tokens=2, ignore_eos=True)
USER = {"role": "user", "content": "hi"}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


MODEL = loaded(tiny(), tokenizer=TOKENIZER)


@pytest.fixture
def llm() -> LLM:
    return LLM(MODEL, kv_memory="256KiB", block_size=4)


@pytest.fixture
def refuses(llm: LLM) -> Callable[..., str]:
    """Return a function that expects a call to be refused before the model has run, and returns the line."""

    def ran(batch: Any) -> None:
        raise AssertionError("something ran")

    def refused(call: Callable[[LLM], object], kind: type[KvatlasError] = ConfigError) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.engine._runner, "run", ran)
            with pytest.raises(kind) as refusal:
                call(llm)
        assert not llm.engine.has_work
        return str(refusal.value)

    return refused


def test_every_form_of_a_batch_gives_the_same_answers(llm: LLM) -> None:
    ids = [TOKENIZER(text)["input_ids"] for text in ("one", "two")]
    wanted = [output.outputs for output in llm.generate(ids, TWO)]
    for batch in (
        ["one", "two"],
        ("one", ids[1]),
        iter(["one", "two"]),
        np.array(ids),
        torch.tensor(ids),
        [{"prompt": "one"}, {"prompt_token_ids": ids[1]}],
        TOKENIZER(["one", "two"], return_tensors="pt"),
        TOKENIZER(["one", "two"], padding="max_length", max_length=9, return_tensors="np"),
    ):
        outputs = llm.generate(batch, TWO)
        assert [output.outputs for output in outputs] == wanted
        assert [list(output.prompt_token_ids) for output in outputs] == ids
    assert llm.generate([USER], TWO)[0].outputs == llm.generate("<s>[user] hi[assistant]", TWO)[0].outputs


@pytest.mark.parametrize(
    ("prompts", "more", "named"),
    [
        (["a", None], {}, "prompt 1 is None; give a text"),
        (["a", "b\ud800"], {}, "prompt 1 has '\\ud800' at character 1"),
        ([[3], [3, 5.0]], {}, "prompt 1 holds 5.0 as token 1"),
        (None, {}, "the prompt is None; give a text"),
        ("a", {"sampling_params": {"max_tokens": 3}}, "sampling_params is {'max_tokens': 3}; write SamplingParams"),
        ("a", {"sampling_params": 3}, "sampling_params is 3; write SamplingParams"),
        ("a", {"sampling_params": {}}, "sampling_params is {}; write SamplingParams"),
        (["a", "b"], {"sampling_params": [TWO]}, "sampling_params has 1 entries for 2 prompts"),
        (["a", "b"], {"sampling_params": [TWO, 3]}, "sampling_params is 3; write SamplingParams"),
        (["a", "b"], {"strategy": ["full"]}, "strategy has 1 entries for 2 prompts"),
        ("a", {"strategy": 3}, "a strategy is 3; write a sentence such as"),
        ("a", {"strategy": b"full"}, "a strategy is b'full'; write a sentence such as"),
    ],
)  # fmt: skip
def test_nothing_runs_where_something_is_refused(refuses: Callable, prompts: Any, more: dict, named: str) -> None:
    assert named in refuses(lambda llm: llm.generate(prompts, **more))


def test_a_strategy_among_many_that_is_unknown_runs_none(refuses: Callable) -> None:
    refuses(lambda llm: llm.generate(["a", "b"], strategy=["full", "h3o"]), UnknownNameError)
    refuses(lambda llm: llm.generate(["a", "b"], [TWO, SamplingParams(max_tokens=10**12)]), CapacityError)


def test_a_stream_is_refused_when_it_is_asked_for(refuses: Callable) -> None:
    """Its errors came with the first token, far from the call."""
    assert "the prompt is a list of 2, 'a' first; give one prompt" in refuses(lambda llm: llm.stream(["a", "b"]))
    assert "sampling_params is 3" in refuses(lambda llm: llm.stream("a", 3))
    assert "a strategy is 3" in refuses(lambda llm: llm.stream("a", strategy=3))
    assert "a strategy is 3" in refuses(lambda llm: llm.session(3))


# Conversations

turns = st.lists(
    st.one_of(st.text("ab c", min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)
REFUSED = ["", [], None, b"a", "\ud800", [3, None], [10**9], ["a", "b"], [USER], {"prompt": 3}, "a" * 200]


@given(turns, st.data())
@settings(deadline=None, max_examples=30)
def test_a_conversation_is_its_turns_with_one_beginning(said: list, data: st.DataObject) -> None:
    """Each later turn got a beginning of text of its own. What is refused in between changes nothing."""
    llm = LLM(MODEL, kv_memory="256KiB", block_size=4)
    known: list[int] = []
    with llm.session() as session:
        for turn in said:
            for odd in data.draw(st.lists(st.sampled_from(REFUSED), max_size=2)) if known else ():
                with pytest.raises((ConfigError, CapacityError)):
                    session.generate(odd, TWO)
                with pytest.raises(ConfigError, match="sampling_params is"):
                    session.generate(turn, {"max_tokens": 2})
            output = session.generate(turn, TWO)
            ids = turn if isinstance(turn, list) else TOKENIZER(turn, add_special_tokens=bool(not known))["input_ids"]
            known += ids
            assert list(output.prompt_token_ids) == known
            known += output.outputs[0].token_ids
        whole = llm.generate(known[: -TWO.max_tokens], TWO)[0]
        assert whole.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_first_turn_that_is_refused_leaves_a_conversation_that_has_not_begun(llm: LLM) -> None:
    session = llm.session()
    for odd in (None, [], ["a", "b"], "a" * 200):
        with pytest.raises((ConfigError, CapacityError)):
            session.generate(odd, TWO)
    assert session.generate([USER], TWO).prompt_token_ids == tuple(llm.encode([USER]))


def test_a_closed_conversation_starts_anew(llm: LLM) -> None:
    session = llm.session()
    first = session.generate("a", TWO)
    session.generate("b", TWO)
    session.close()
    assert llm.engine.store.books().used == 0
    again = session.generate("a", TWO)
    assert (again.prompt_token_ids, again.outputs) == (first.prompt_token_ids, first.outputs)


@pytest.mark.parametrize("stop", ["<|end|>", "end", "</s>", "<ab>", "a<|end|>"])
def test_a_special_token_stops_where_transformers_stops(stop: str) -> None:
    """The text of a special token never stopped, because it was looked for in a text without it."""
    model = tiny()
    prompt = TOKENIZER("abc", return_tensors="pt")
    free = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    special = TOKENIZER.convert_tokens_to_ids("<|end|>")
    with torch.no_grad():  # what is said third becomes <|end|>
        model.lm_head.weight[special] = model.lm_head.weight[free[2]] * 1.3
    wanted = model.generate(
        **prompt,
        max_new_tokens=8,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(TOKENIZER, [stop])]),
    )[0, prompt["input_ids"].shape[1] :]
    ours = LLM(loaded(model, tokenizer=TOKENIZER), kv_memory="256KiB")
    output = ours.generate("abc", SamplingParams(max_tokens=8, stop=stop))[0].outputs[0]
    assert list(output.token_ids) == wanted.tolist()
    assert special in output.token_ids
    text = "".join(new.text for new in ours.stream("abc", SamplingParams(max_tokens=8, stop=stop)))
    assert text == output.text == TOKENIZER.decode(wanted, skip_special_tokens=True)
