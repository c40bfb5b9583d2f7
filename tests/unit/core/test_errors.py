import pickle

import pytest
from hypothesis import given, strategies as st

from kvatlas.core import errors
from kvatlas.core.errors import ConfigError, KvatlasError, one_line
from kvatlas.core.names import nearest, unknown_name
from kvatlas.strategies.strategy import Strategy

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KvatlasError)]


@given(st.text(max_size=2000), st.sampled_from(TREE))
def test_every_message_is_one_line_of_bounded_length(text, kind):
    error = kind(f"value {text!r}{text} is odd; write 7")
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) <= 700
    assert str(error).startswith("value ") and str(error).endswith(" is odd; write 7")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@given(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=199))
def test_what_is_short_is_said_in_full(text):
    assert str(ConfigError(f"value {text} is odd")) == f"value {text} is odd"


def test_of_a_long_word_both_ends_stay():
    line = one_line(f"unknown strategy '{'a' * 100_000}'; did you mean 'h2o'?")
    assert line.startswith("unknown strategy 'aaa") and line.endswith("aaa'; did you mean 'h2o'?")
    assert len(line) < 200 and "(99,883 characters)" in line


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("H2O", "did you mean 'h2o'"),
        ("InfiniGen", "did you mean 'infinigen'"),
        ("infinigenn", "did you mean 'infinigen'"),
        ("StreamingLLM", "did you mean 'streaming_llm'"),
        ("SnapKV", "did you mean 'snapkv'"),
        ("int4", "write 'kivi(bits=4)'"),
        ("INT2", "write 'kivi(bits=2)'"),
        ("h2o(Heavy=0.1)", "did you mean 'heavy'"),
        ("infinigen(alpha=2)", "write its stages: 'rehearse("),
    ],
)
def test_strategies_are_known_by_case_recipe_and_other_names(written, meant):
    with pytest.raises(ConfigError) as refused:
        Strategy.parse(written)
    assert meant in str(refused.value)
    suggestion = str(refused.value).split("'")[-2]
    assert suggestion == "heavy" or Strategy.parse(suggestion)


def test_among_thousands_of_names_the_nearest_five_are_told():
    names = [f"task_{number}" for number in range(10_000)]
    line = str(unknown_name("task", "nosuch", names))
    assert line.count("task_") == 5 and "10,000" in line and len(line) < 200
    assert "did you mean 'task_77'" in str(unknown_name("task", "Task_77", names))


def test_few_names_are_all_told():
    assert str(unknown_name("preset", "zzz", ["quick", "full"])) == "unknown preset 'zzz'; known: full, quick"


@given(st.text(max_size=300), st.lists(st.text(min_size=1, max_size=9), max_size=20))
def test_the_nearest_are_names(name, names):
    found = nearest(name, names, 5)
    assert set(found) <= set(names) and len(found) == min(5, len({each.lower() for each in names}))
