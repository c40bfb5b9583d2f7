"""Text as it comes, stop strings, cancellation, and prompts that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from tests.driving import Job, finish, force, loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import CapacityError, ConfigError
from kvatlas.engine.detokenizer import Detokenizer
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import FinishReason

LETTERS = [b"a", b"b", b"ab", b"ba", b" ", b"aab", b"b a"]
PIECES = [b"", b"", b"", *LETTERS, b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98", b"\x80"]


class Bytes:
    """A tokenizer whose tokens are pieces of UTF-8, some of them half a character; none is special."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(PIECES[token % len(PIECES)] for token in ids).decode(errors="replace")

    def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [PIECES.index(letter.encode()) for letter in text]}


MODEL = loaded(tiny_model("llama"), tokenizer=Bytes())
PROMPT = token_ids(7)[0].tolist()


def llm(**options) -> LLM:
    return LLM(MODEL, kv_memory="256KiB", block_size=4, **options)


def streamed(outputs: list[int], **params) -> tuple[list[str], object]:
    """Return the texts that come one by one when the model's answer is ``outputs``, and the request."""
    engine = llm().engine
    job = Job(PROMPT, outputs)
    force(engine, [job])
    job.request = engine.add_request(
        PROMPT, SamplingParams(**{"max_tokens": len(outputs), "ignore_eos": True, **params})
    )
    texts = []
    while job.request.finish_reason is None:
        texts += [new.text for new in engine.step()]
    assert engine.store.books().used == 0
    detokenizer = engine._detokenizer
    assert not detokenizer._outputs, "an ended request is remembered"
    return texts, job.request


pieces = st.lists(st.integers(3, len(PIECES) - 1), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(pieces, st.lists(st.text("ab é", min_size=1, max_size=3), max_size=2))
def test_streamed_text_is_the_final_text(outputs: list[int], stop: list[str]) -> None:
    texts, request = streamed(outputs, stop=tuple(stop))
    assert "".join(texts) == request.text
    whole = Bytes().decode(request.output_ids, skip_special_tokens=True)
    assert whole.startswith(request.text)
    assert not any(each in request.text for each in stop), "the stop string is not part of the text"
    if request.finish_reason is FinishReason.STOP:
        assert any(whole.startswith(request.text + each) for each in stop)
    else:
        assert len(request.output_ids) == len(outputs) and request.text == whole


def test_stop_string_across_tokens() -> None:
    a, b, space = (PIECES.index(piece) for piece in (b"a", b"b", b" "))
    texts, request = streamed([b, a, a, b, a, space], stop="aab")
    assert request.text == "b" and "".join(texts) == "b"
    assert len(request.output_ids) == 4 and request.finish_reason is FinishReason.STOP


def test_text_that_cannot_be_part_of_a_stop_string_is_not_held_back_for_ever() -> None:
    a = PIECES.index(b"a")
    texts, _ = streamed([a] * 6, stop="xyz")
    assert texts == ["", "", "a", "a", "a", "aaa"]


def test_stop_strings_wait_for_min_tokens() -> None:
    a, b = PIECES.index(b"a"), PIECES.index(b"b")
    _, request = streamed([a, b, a, b, a], stop="b", min_tokens=3)
    assert request.text == "aba" and len(request.output_ids) == 4


def test_characters_come_whole() -> None:
    halves = [PIECES.index(piece) for piece in (b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98", b"\x80", b"a")]
    texts, request = streamed(halves)
    assert texts == ["", "é", "", "", "😀", "a"] and request.text == "é😀a"


def test_equal_request_ids_do_not_mix_texts() -> None:
    engine = llm().engine
    a, b = (Job(PROMPT, [PIECES.index(piece)] * 5) for piece in (b"a", b"b"))
    force(engine, [a, b])
    for job in (a, b):
        job.request = engine.add_request(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True), request_id="same")
    finish(engine)
    assert (a.request.text, b.request.text) == ("aaaaa", "bbbbb")


def test_without_tokenizer_there_is_no_text() -> None:
    assert Detokenizer(None).advance(None) is False
    plain = LLM(type(MODEL)(adapter=MODEL.adapter, tokenizer=None, name="plain"), kv_memory="256KiB")
    assert plain.generate(PROMPT, SamplingParams(max_tokens=3))[0].outputs[0].text == ""
    with pytest.raises(ConfigError, match="plain has no tokenizer"):
        plain.generate("ab")


# Life of a request


def test_stream_left_early_frees_memory() -> None:
    engine = (model := llm()).engine
    for new in model.stream(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True)):
        assert engine.store.books().used > 0
        if len(new.request.output_ids) == 3:
            break
    del new
    assert not engine.has_work and engine.store.books().used == 0


def test_stream_gives_every_token() -> None:
    model = llm()
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    news = list(model.stream(PROMPT, params))
    assert [new.token_id for new in news] == list(model.generate(PROMPT, params)[0].outputs[0].token_ids)
    assert [new.finished for new in news] == [False] * 5 + [True]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("strategy", ["full", "h2o(heavy=2, recent=2)"])
def test_cancel_at_any_time(steps: int, strategy: str) -> None:
    engine = llm(max_batched_tokens=4).engine
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    going, gone = engine.add_request(PROMPT, params), engine.add_request(PROMPT[::-1], params, strategy)
    for _ in range(steps):
        engine.step()
    engine.cancel(gone)
    engine.cancel(gone)
    assert gone.finish_reason is FinishReason.CANCELLED and gone.seq is None
    finish(engine)
    assert going.finish_reason is FinishReason.LENGTH and len(going.output_ids) == 8
    engine.cancel(going)
    assert going.finish_reason is FinishReason.LENGTH, "an ended request stays ended"
    assert engine.store.books().used == 0


def test_an_error_among_prompts_runs_none() -> None:
    model = llm()
    with pytest.raises(ConfigError, match="the prompt is empty"):
        model.generate([PROMPT, []])
    assert not model.engine.has_work and model.engine.store.books().used == 0


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "message"),
    [
        ([], {}, ConfigError, "the prompt is empty; give at least one token"),
        ("", {}, ConfigError, "the prompt is empty; give at least one token"),
        ([5, 101], {}, ConfigError, "token id 101 is outside the vocabulary of 101 tokens"),
        ([-1], {}, ConfigError, "the prompt holds -1 as token 0; token ids are whole numbers, at least 0"),
        ([5], {"max_tokens": 10**12}, CapacityError, "exceeds the 128 positions of llama"),
        ([5] * 120, {"max_tokens": 9}, CapacityError, "exceeds the 128 positions of llama"),
        ([5] * 100, {"max_tokens": 20}, CapacityError, "raise --kv-memory"),
    ],
)
def test_prompts_refused(prompt, params: dict, kind: type[Exception], message: str) -> None:
    model = LLM(MODEL, kv_memory="64KiB", block_size=4)
    with pytest.raises(kind) as refusal:
        model.generate([prompt], SamplingParams(**params))
    assert message in str(refusal.value)
    assert not model.engine.has_work


@pytest.mark.parametrize("option", ["max_num_seqs", "max_batched_tokens", "block_size"])
def test_engine_options_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        LLM(MODEL, **{option: 0})
    with pytest.raises(CapacityError, match=r"exceeds the .* available"):
        LLM(MODEL, kv_memory="900TB")


def test_lists_must_match() -> None:
    model = llm()
    with pytest.raises(ConfigError, match="strategy has 1 entries for 2 prompts"):
        model.generate([PROMPT, PROMPT], strategy=["full"])
    with pytest.raises(ConfigError, match="no prompt is given"):
        model.generate([])
    outputs = model.generate([PROMPT, PROMPT], strategy=["full", "h2o(heavy=2, recent=2)"])
    assert [output.strategy for output in outputs] == ["full", "h2o(heavy=2, recent=2)"]


def test_a_failed_turn_leaves_the_conversation_usable() -> None:
    model = llm()
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with model.session() as session:
        session.generate(PROMPT, params)
        with pytest.raises(ConfigError):
            session.generate([], params)
        with pytest.raises(CapacityError):
            session.generate([5] * 120, params)
        assert len(session.generate(PROMPT, params).outputs[0].token_ids) == 3
    assert model.engine.store.books().used == 0


@pytest.mark.parametrize("first_to_write", [0, 1])
def test_forked_conversations_do_not_see_each_other(first_to_write: int) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = token_ids(6, 9, seed=4)
    wanted = []
    for prompt in prompts:
        model = llm(enable_prefix_caching=False)
        with model.session() as session:
            session.generate(PROMPT, params)
            wanted.append(session.generate(prompt.tolist(), params).outputs[0].token_ids)
    model = llm(enable_prefix_caching=False)
    with model.session() as session:
        session.generate(PROMPT, params)
        with session.fork() as other:
            model.engine.store.arena.check()
            both = [session, other]
            for turn in (first_to_write, 1 - first_to_write):
                assert both[turn].generate(prompts[turn].tolist(), params).outputs[0].token_ids == wanted[turn]
    model.engine.store.arena.check()
    assert model.engine.store.books().used == 0
