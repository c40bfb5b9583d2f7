"""Text and stop strings over random vocabularies, against transformers' own decoding and stopping."""

from __future__ import annotations

from itertools import groupby
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.unit.engine.vocabularies import SPECIAL, byte_tokenizer, metaspace_tokenizer, random_tokenizer
from transformers import StopStringCriteria

from kvatlas.engine.detokenizer import Detokenizer
from kvatlas.engine.request import FinishReason

TOKENIZERS = [random_tokenizer(Random(seed)) for seed in range(8)]
ENGLISH = byte_tokenizer()

outputs = st.integers(0, len(TOKENIZERS) - 1).flatmap(
    lambda index: st.tuples(
        st.just(TOKENIZERS[index]), st.lists(st.integers(0, len(TOKENIZERS[index]) - 1), min_size=1, max_size=24)
    )
)
# Parts of special tokens, whole ones, text around them, and plain text, short enough to come about.
plain_stops = st.text("abc <>|dn", min_size=1, max_size=3)
stops = st.lists(st.one_of(st.sampled_from([*SPECIAL, "a<|end|>", "<s>b", "end|"]), plain_stops), max_size=3)


class Reply(SimpleNamespace):
    """Stands for a request, as far as a detokenizer looks at one."""

    __hash__ = object.__hash__


def spoken(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0) -> tuple[Reply, list[str]]:
    """Return the reply whose tokens are ``ids``, and the texts that were given out one by one."""
    detokenizer, texts = Detokenizer(tokenizer), []
    reply = Reply(params=SimpleNamespace(stop=stop, min_tokens=min_tokens), text="", finish_reason=None, output_ids=[])
    for token in ids:
        reply.output_ids = [*reply.output_ids, token]
        if detokenizer.advance(reply):
            reply.finish_reason = FinishReason.STOP
        elif len(reply.output_ids) == len(ids):
            reply.finish_reason = FinishReason.LENGTH
        texts.append(detokenizer.take(reply, finished=reply.finish_reason is not None))
        if reply.finish_reason is not None:
            break
    return reply, texts


@given(outputs)
@settings(deadline=None, max_examples=300)
def test_the_text_is_what_the_tokenizer_decodes(case) -> None:
    tokenizer, ids = case
    reply, texts = spoken(tokenizer, ids)
    assert reply.text == "".join(texts) == tokenizer.decode(ids, skip_special_tokens=True)


@given(outputs, stops)
@settings(deadline=None, max_examples=300)
def test_it_ends_where_transformers_ends(case, stop: list[str]) -> None:
    tokenizer, ids = case
    reply, texts = spoken(tokenizer, ids, tuple(stop))
    assert reply.text == "".join(texts), "what was given out is never taken back"
    ends = StopStringCriteria(tokenizer, stop) if stop else lambda ids, scores: torch.tensor([False])
    wanted = next((n for n in range(1, len(ids) + 1) if ends(torch.tensor([ids[:n]]), None).item()), None)
    assert (len(reply.output_ids) if reply.finish_reason is FinishReason.STOP else None) == wanted


@given(outputs, stops)
@settings(deadline=None, max_examples=300)
def test_the_text_is_what_stands_before_the_first_stop_string(case, stop: list[str]) -> None:
    tokenizer, ids = case
    reply, _ = spoken(tokenizer, ids, tuple(stop))
    written = tokenizer.decode(reply.output_ids, skip_special_tokens=False)
    if "\N{REPLACEMENT CHARACTER}" in written:  # halves of a character around a special token make up a whole one
        return
    first = min((written.find(one) for one in stop if one in written), default=len(written))
    wanted, place = "", 0
    for special, run in groupby(reply.output_ids, lambda token: token in tokenizer.all_special_ids):
        text = tokenizer.decode(list(run))
        wanted += "" if special else text[: max(0, first - place)]
        place += len(text)
    assert reply.text == wanted


@pytest.mark.parametrize("hidden", ["", "<|end|>", "<ab><s>"])
def test_a_space_before_the_first_word_comes_and_goes_as_in_the_whole(hidden: str) -> None:
    tokenizer = metaspace_tokenizer()
    special = tokenizer.convert_tokens_to_ids([one for one in ("<|end|>", "<ab>", "<s>") if one in hidden])
    hello, a = tokenizer.convert_tokens_to_ids(["▁hello", "▁a"])
    for ids in ([hello, *special, a], [*special, hello, a], [hello, *special, *special, hello, *special, a]):
        reply, texts = spoken(tokenizer, ids)
        assert reply.text == "".join(texts) == tokenizer.decode(ids, skip_special_tokens=True)
        assert spoken(tokenizer, ids, (" a",))[0].text == reply.text.removesuffix(" a")


@given(st.lists(st.sampled_from(["é", "😀", "€", "a", " ", "<|end|>"]), min_size=1, max_size=10))
@settings(deadline=None)
def test_characters_of_single_bytes_come_whole(letters: list[str]) -> None:
    for tokenizer in (metaspace_tokenizer(), ENGLISH):
        ids = tokenizer("".join(letters), add_special_tokens=False)["input_ids"]
        reply, texts = spoken(tokenizer, ids)
        assert reply.text == "".join(texts) == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_bytes_that_are_no_text_are_neither_kept_for_ever_nor_decoded_again_and_again() -> None:
    lengths = []

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            lengths.append(len(ids))
            return ENGLISH.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = [0xFF] * 500
    reply, texts = spoken(Counting(), ids)
    assert reply.text == "".join(texts) == ENGLISH.decode(ids)
    assert texts[100:400] == ["\N{REPLACEMENT CHARACTER}"] * 300
    assert max(lengths) < 100


def test_an_end_token_gives_out_an_incomplete_character() -> None:
    """The text was one character short of the tokenizer's where the model ended in the middle of one."""
    ids = [*b"a\xc3", ENGLISH.eos_token_id]
    detokenizer, reply = Detokenizer(ENGLISH), Reply(params=SimpleNamespace(stop=(), min_tokens=0), text="")
    for count in range(1, 4):
        reply.output_ids = ids[:count]
        assert not detokenizer.advance(reply)
        reply.finish_reason = FinishReason.STOP if count == 3 else None
        text = detokenizer.take(reply, finished=reply.finish_reason is not None)
    assert (text, reply.text) == ("\N{REPLACEMENT CHARACTER}", "a\N{REPLACEMENT CHARACTER}")
