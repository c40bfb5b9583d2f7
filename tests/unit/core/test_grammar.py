"""The grammar of strategies: what is printed parses back, and what cannot be read is refused with its text."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvatlas.core.errors import ConfigError
from kvatlas.core.grammar import StageCall, format_value, parse_sentence

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True)
words = st.from_regex(r"[A-Za-z_][\w./+:-]{0,8}", fullmatch=True).filter(
    lambda word: word.isascii() and word.lower() not in ("true", "false", "nan", "inf", "infinity")
)
values = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), words)
calls = st.builds(
    StageCall,
    name=names,
    positional=st.lists(values, max_size=3).map(tuple),
    named=st.dictionaries(names, values, max_size=3).map(lambda named: tuple(named.items())),
)


@given(st.lists(calls, min_size=1, max_size=4))
def test_round_trip(written: list[StageCall]) -> None:
    text = " | ".join(map(str, written))
    read = parse_sentence(text)
    assert read == written
    assert " | ".join(map(str, read)) == text
    assert [type(value) for call in read for value in call.positional] == [
        type(value) for call in written for value in call.positional
    ], "1 stays a number of tokens, 1.0 a fraction"


@given(values)
def test_values_keep_their_type(value: object) -> None:
    (call,) = parse_sentence(f"stage({format_value(value)})")
    assert call.positional == (value,) and type(call.positional[0]) is type(value)


@given(calls)
def test_spaces_do_not_matter(written: StageCall) -> None:
    spaced = f"  {written} ".replace("(", " ( ").replace(")", " ) ").replace(", ", " ,  ").replace("=", " = ")
    assert parse_sentence(spaced) == [written]


@given(st.text(max_size=30))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        calls = parse_sentence(text)
    except ConfigError as error:
        assert "\n" not in str(error) or "\n" in text
    else:
        assert parse_sentence(" | ".join(map(str, calls))) == calls or "nan" in text.lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "strategy is empty"),
        ("  ", "strategy is empty"),
        ("h2o(", "cannot read stage 'h2o('"),
        ("h2o)", "cannot read stage 'h2o)'"),
        ("full |", "cannot read stage ''"),
        ("| full", "cannot read stage ''"),
        ("2fast", "cannot read stage '2fast'"),
        ("h2o(heavy=1, heavy=2)", "parameter 'heavy' is given twice"),
        ("h2o(heavy=1, 2)", "'2' follows a named parameter"),
        ("h2o(heavy=)", "cannot read value ''"),
        ("h2o(heavy=a b)", "cannot read value 'a b'"),
        ("h2o(1,)", "cannot read value ''"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"\S") as refusal:
        parse_sentence(text)
    assert message in str(refusal.value)


def test_written_forms() -> None:
    assert str(StageCall(name="full")) == "full"
    assert parse_sentence("full()") == [StageCall(name="full")]
    (call,) = parse_sentence("place(host, 16GB/s, on=TRUE, share=.5)")
    assert call.positional == ("host", "16GB/s") and call.named == (("on", True), ("share", 0.5))
