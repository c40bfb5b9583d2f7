"""Recall prompts: exact length, determinism, and the asked fact truly in the context."""

import re

import pytest

from kvatlas.workloads.recall import (
    NAMES,
    VALUE_DIGITS,
    RecallPrompt,
    RecallTask,
    fact_text,
    make_recall_prompts,
    question_text,
    read_filler,
)

FILLER = "one two three four five six seven eight nine ten " * 20
FACT_TOKENS = 1 + VALUE_DIGITS + 1


class WordEncoder:
    """Gives each word and each punctuation mark an id, in order of first use."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str) -> list[int]:
        """Return the ids of the words of ``text``."""
        found = re.findall(r"\w+|[^\w\s]", text)
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return [self.words.index(word) for word in found]

    def decode(self, ids: tuple[int, ...]) -> list[str]:
        """Return the words of ``ids``."""
        return [self.words[index] for index in ids]


@pytest.fixture
def encode() -> WordEncoder:
    """A tokenizer whose tokens are words."""
    return WordEncoder()


def asked_fact(encode: WordEncoder, prompt: RecallPrompt) -> list[str]:
    """Return the words of the prompt at the place of the asked fact."""
    start = prompt.fact_position
    return encode.decode(prompt.prompt[start : start + FACT_TOKENS])


@pytest.mark.parametrize("context_tokens", [9, 10, 33, 512])
def test_prompt_has_exactly_the_asked_length(encode: WordEncoder, context_tokens: int) -> None:
    task = RecallTask(num_keys=1, context_tokens=context_tokens)
    assert {len(p.prompt) for p in make_recall_prompts(task, encode, FILLER, 5, seed=0)} == {context_tokens}


def test_filler_shorter_than_the_context_is_repeated(encode: WordEncoder) -> None:
    [prompt] = make_recall_prompts(RecallTask(num_keys=1, context_tokens=400), encode, "just these words", 1, seed=0)
    assert len(prompt.prompt) == 400


def test_same_seed_same_prompts_other_seed_other_prompts(encode: WordEncoder) -> None:
    task = RecallTask(num_keys=4, context_tokens=128)
    first = make_recall_prompts(task, encode, FILLER, 8, seed=3)
    assert first == make_recall_prompts(task, encode, FILLER, 8, seed=3)
    assert first != make_recall_prompts(task, encode, FILLER, 8, seed=4)


@pytest.mark.parametrize("num_keys", [1, 16, len(NAMES)])
def test_fact_stands_before_the_question_and_holds_the_answer(encode: WordEncoder, num_keys: int) -> None:
    task = RecallTask(num_keys=num_keys, context_tokens=FACT_TOKENS * num_keys + 50)
    for prompt in make_recall_prompts(task, encode, FILLER, 20, seed=1):
        words = encode.decode(prompt.prompt)
        name = words[-1]
        assert prompt.text_question == question_text(name)
        assert asked_fact(encode, prompt) == [name, *encode.decode(prompt.answer), "."]
        assert prompt.fact_position + FACT_TOKENS <= len(words) - len(encode(prompt.text_question))


def test_the_asked_name_has_one_fact_and_every_key_is_there(encode: WordEncoder) -> None:
    task = RecallTask(num_keys=16, context_tokens=300)
    for prompt in make_recall_prompts(task, encode, FILLER, 20, seed=2):
        words = encode.decode(prompt.prompt)
        planted = [word for word in words[:-1] if word in NAMES]
        assert len(planted) == len(set(planted)) == 16
        assert planted.count(words[-1]) == 1


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_depth_places_a_single_fact(encode: WordEncoder, depth: float) -> None:
    task = RecallTask(num_keys=1, context_tokens=203, fact_depth=depth)
    filler_tokens = 203 - FACT_TOKENS - len(encode(question_text(NAMES[0])))
    positions = {p.fact_position for p in make_recall_prompts(task, encode, FILLER, 10, seed=0)}
    assert positions == {round(depth * filler_tokens)}


def test_depth_zero_puts_the_asked_fact_before_all_others(encode: WordEncoder) -> None:
    task = RecallTask(num_keys=16, context_tokens=140, fact_depth=0.0)
    assert {p.fact_position for p in make_recall_prompts(task, encode, FILLER, 20, seed=0)} == {0}


def test_without_depth_facts_spread_over_the_whole_context(encode: WordEncoder) -> None:
    task = RecallTask(num_keys=4, context_tokens=500)
    positions = [p.fact_position for p in make_recall_prompts(task, encode, FILLER, 400, seed=0)]
    in_quarters = [
        sum(quarter * 125 <= position < quarter * 125 + 125 for position in positions) for quarter in range(4)
    ]
    assert min(in_quarters) > 60


def test_fact_is_a_name_directly_followed_by_its_digits() -> None:
    assert fact_text("Maria", 42) == " Maria 0 0 4 2."


def test_shipped_filler_mentions_no_recall_name() -> None:
    filler = read_filler()
    assert 150_000 <= len(filler) <= 250_000
    assert not set(NAMES) & set(re.findall(r"\w+", filler))


def test_context_too_short_for_the_facts_is_refused(encode: WordEncoder) -> None:
    with pytest.raises(ValueError, match=r"context_tokens=20 .* num_keys=4"):
        make_recall_prompts(RecallTask(num_keys=4, context_tokens=20), encode, FILLER, 1, seed=0)


def test_filler_without_tokens_is_refused(encode: WordEncoder) -> None:
    with pytest.raises(ValueError, match="filler_text"):
        make_recall_prompts(RecallTask(num_keys=1, context_tokens=20), encode, " ", 1, seed=0)


def test_negative_count_is_refused(encode: WordEncoder) -> None:
    with pytest.raises(ValueError, match="-1"):
        make_recall_prompts(RecallTask(num_keys=1, context_tokens=20), encode, FILLER, -1, seed=0)


@pytest.mark.parametrize(
    ("num_keys", "context_tokens", "depth", "named"),
    [
        (0, 100, None, "num_keys .* 0"),
        (len(NAMES) + 1, 100_000, None, f"num_keys .* {len(NAMES) + 1}"),
        (1, 0, None, "context_tokens .* 0"),
        (1, 100, -0.1, "fact_depth .* -0.1"),
        (1, 100, 1.5, "fact_depth .* 1.5"),
        (1, 100, float("nan"), "fact_depth .* nan"),
    ],
)
def test_impossible_tasks_are_refused(num_keys: int, context_tokens: int, depth: float | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RecallTask(num_keys=num_keys, context_tokens=context_tokens, fact_depth=depth)
