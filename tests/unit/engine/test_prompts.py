"""Prompts in every form that users of transformers, vLLM and OpenAI are used to: understood, or refused by name."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.unit.engine.vocabularies import byte_tokenizer, metaspace_tokenizer
from transformers import BatchEncoding

from kvatlas.core.errors import ConfigError
from kvatlas.engine.prompts import encode, split, token_ids

BYTES = byte_tokenizer(chat=True)
IDS = [3, 5, 7]
USER = {"role": "user", "content": "hi"}

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda ids: (token for token in ids),
    "map": lambda ids: map(int, ids),
    "array": lambda ids: array("q", ids),
    "numpy": np.array,
    "numpy uint16": lambda ids: np.array(ids, dtype=np.uint16),
    "numpy objects": lambda ids: np.array(ids, dtype=object),
    "numpy row": lambda ids: np.array([ids]),
    "tensor": torch.tensor,
    "tensor int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "tensor row": lambda ids: torch.tensor([ids]),
    "numpy scalars": lambda ids: [np.int64(token) for token in ids],
    "tensor scalars": lambda ids: [torch.tensor(token) for token in ids],
}
ALSO = {
    "vllm": lambda ids: {"prompt_token_ids": ids},
    "vllm with its text": lambda ids: {"prompt": "a text", "prompt_token_ids": ids},
    "mapping": lambda ids: {"input_ids": ids},
    "mapping of a row": lambda ids: {"input_ids": [ids], "attention_mask": [[1] * len(ids)]},
    "tokenizer's": lambda ids: BatchEncoding(
        {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt"
    ),
    "padded left": lambda ids: {"input_ids": [0, 0, *ids], "attention_mask": [0, 0, *[1] * len(ids)]},
    "padded right": lambda ids: {
        "input_ids": torch.tensor([[*ids, 9]]),
        "attention_mask": [[True] * len(ids) + [False]],
    },
}


def understood(prompt: Any, **options: Any) -> list[int]:
    return encode(prompt, BYTES, "tiny", **options)


@pytest.mark.parametrize("form", FORMS)
def test_token_ids_of_any_form(form: str) -> None:
    for read in (token_ids, understood, lambda given: understood(*split(given))):
        ids = read(FORMS[form](IDS))
        assert ids == IDS and all(type(token) is int for token in ids)
    assert token_ids(IDS) is not IDS, "the caller's list stays the caller's"


@pytest.mark.parametrize("form", ALSO)
def test_mappings(form: str) -> None:
    assert understood(ALSO[form](IDS)) == IDS
    assert [understood(one) for one in split(ALSO[form](IDS))] == [IDS]
    assert [understood(one) for one in split([ALSO[form](IDS), "a"])] == [IDS, understood("a")]


@pytest.mark.parametrize("form", [form for form in FORMS if "row" not in form])
def test_a_batch_of_any_form(form: str) -> None:
    batch = [IDS, [9], [1, 2]]
    for make in (list, tuple, iter):
        assert [understood(one) for one in split(make([FORMS[form](ids) for ids in batch]))] == batch


def test_rows_and_texts_are_batches() -> None:
    for rows in (np.array([IDS, IDS]), torch.tensor([IDS, IDS])):
        assert [understood(one) for one in split(rows)] == [IDS, IDS]
    for texts in (
        ["a", "b"],
        ("a", "b"),
        iter("ab"),
        np.array(["a", "b"]),
        [{"prompt": "a"}, "b"],
    ):
        assert [understood(one) for one in split(texts)] == [understood("a"), understood("b")]
    for tensors in ("pt", "np", None):
        padded = BYTES(["hi", "hello there"], padding=True, return_tensors=tensors)
        assert [understood(one) for one in split(padded)] == [understood("hi"), understood("hello there")]


no_tokens = st.one_of(
    *(st.none(), st.booleans(), st.floats(), st.text(), st.binary(), st.integers(max_value=-1)),
    st.sampled_from([np.bool_(True), np.float32(3), torch.tensor(3.0), torch.tensor(True), [3], (), {}, 3j, object()]),
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**70)), st.data())
def test_token_ids_refuse_whatever_is_no_whole_number(ids: list[int], data: st.DataObject) -> None:
    odd = data.draw(no_tokens)
    place = data.draw(st.integers(0, len(ids)))
    with pytest.raises(ConfigError, match=f" as token {place}; token ids are whole numbers, at least 0") as refusal:
        token_ids([*ids[:place], odd, *ids[place:]])
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (None, "the prompt is None; give a text, token ids, or messages with role and content"),
        (3, "the prompt is 3; give"),
        (True, "the prompt is True; give"),
        (torch.tensor(3), "the prompt is tensor(3); give"),
        (b"hi", "the prompt is b'hi'; decode it, as in prompt.decode()"),
        (Path("notes.txt"), "read the file, as in prompt.read_text()"),
        ({"hi"}, "the prompt is {'hi'}; give"),
        ("a\ud800b", "the prompt has '\\ud800' at character 1, half of a surrogate pair"),
        ([3, 5.0], "the prompt holds 5.0 as token 1"),
        ([[3, 5]], "the prompt is a list of 1, [3, 5] first; give one prompt here"),
        (["a", "b"], "the prompt is a list of 2, 'a' first; give one prompt here"),
        (torch.zeros(2, 3, 4), "the prompt is a list of 2, "),
        (torch.tensor([0.5]), "the prompt holds 0.5 as token 0"),
        ({}, "the prompt is a mapping whose 'prompt' is None; give a text"),
        ({"prompt": b"hi"}, "the prompt is a mapping whose 'prompt' is b'hi'; give a text"),
        ({"prompt": "a", "multi_modal_data": {}}, "the prompt is a mapping with 'multi_modal_data'; give 'prompt'"),
        ({"inputs_embeds": 3}, "the prompt is a mapping with 'inputs_embeds'"),
        ({"prompt_token_ids": [3.0]}, "prompt_token_ids of the prompt holds 3.0 as token 0"),
        ({"input_ids": None}, "input_ids or attention_mask is None"),
        ({"input_ids": [3], "token_type_ids": [0]}, "'token_type_ids' beside input_ids cannot be used"),
        ({"input_ids": [3, 5], "attention_mask": [1]}, "row 0 of attention_mask does not fit 2 token ids"),
        ({"input_ids": [3, 5], "attention_mask": [1, 2]}, "row 0 of attention_mask does not fit 2 token ids"),
        ({"input_ids": [[3]], "attention_mask": torch.ones(1, 1, 2)}, "row 0 of attention_mask does not fit 1 token"),
        ({"input_ids": [[3], [5]], "attention_mask": [[1]]}, "input_ids has 2 rows and attention_mask 1"),
        ({"input_ids": [[3], [5]]}, "the prompt holds 2 rows of input_ids; give one here"),
        (USER, "the prompt is a mapping with 'content', 'role'; give"),
        ([USER, {"role": "user"}], "content of message 1 of the prompt is None; give a text"),
        ([{"role": 3, "content": "hi"}], "role of message 0 of the prompt is 3; give a text"),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "content of message 0 of the prompt is [{"),
        ([{"role": "user", "content": "\udfff"}], "content of message 0 of the prompt has '\\udfff'"),
        ([{"role": "robot", "content": "hi"}], "the chat template of tiny refuses the messages of the prompt"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_named(prompt: Any, named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        understood(prompt)
    assert named in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("nothing", [[], (), iter([])])
def test_no_prompt_at_all(nothing: Any) -> None:
    with pytest.raises(ConfigError, match="no prompt is given"):
        split(nothing)


def test_messages_go_through_the_chat_template_and_begin_once() -> None:
    answer = [USER, {"role": "assistant", "content": "Well"}]
    assert BYTES.decode(understood([USER])) == "<s>[user] hi[assistant]"
    assert BYTES.decode(understood(answer)) == "<s>[user] hi[assistant] Well", "what was begun is continued"
    assert [understood(one) for one in split([USER])] == [understood([USER])]
    assert [understood(one) for one in split([[USER], answer])] == [understood([USER]), understood(answer)]
    with pytest.raises(ConfigError, match="tokenizer of tiny has no chat template for messages; write"):
        encode([USER], byte_tokenizer(), "tiny")
    with pytest.raises(ConfigError, match="tiny has no tokenizer"):
        encode([USER], None, "tiny")
    with pytest.raises(ConfigError, match="messages, which begin a conversation; continue it with"):
        understood([USER], continued=True)


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_a_text_that_begins_with_the_beginning_is_not_given_another(begin: bool, end: bool) -> None:
    tokenizer = byte_tokenizer(begin=begin, end=end)
    start, stop = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text, written in (("<s>a", 1), ("<s>", 1), ("<s><s>a", 2), ("a<s>", 1)):
        ids = encode(text, tokenizer, "tiny")
        assert ids.count(start) == written + (begin and not text.startswith("<s>"))
        assert (ids[-1] == stop) is end, "what stands around a text otherwise stays"
    assert encode("a", tokenizer, "tiny") == tokenizer("a")["input_ids"]


@given(st.lists(st.text("ab \né", max_size=5), min_size=1, max_size=4))
def test_continued_texts_are_one_text(parts: list[str]) -> None:
    """Fragments were encoded as documents: each with a beginning, an end, and a space before it."""
    tokenizers = [byte_tokenizer(end=True), byte_tokenizer(end=True, prefix_space=True), metaspace_tokenizer()]
    for tokenizer in tokenizers:
        ids = [token for part in parts for token in encode(part, tokenizer, "tiny", continued=True)]
        before = tokenizer("a", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([*before, *ids]).removeprefix(" ") == "a" + "".join(parts)
