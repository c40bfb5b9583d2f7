import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.experiments.accuracy_budget import keys_of
from kvatlas.experiments.kept_fraction import at_budget, compared, has_budget
from kvatlas.strategies.strategy import Strategy


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("h2o", "h2o(heavy=0.15, recent=0.15)"),
        ("snapkv(budget=64, pool=3)", "snapkv(budget=0.3, window=16, pool=3)"),
        ("streaming_llm(sinks=2, recent=9)", "streaming_llm(sinks=4, recent=0.3)"),
        ("infinigen", "rehearse(alpha=inf, cap=0.3) | offload(host)"),
        ("h2o | bf16", "h2o(heavy=0.15, recent=0.15) | bf16"),
        ("full | bf16", "full | bf16"),
    ],
)
def test_a_kept_fraction_of_each(sentence, expected):
    assert str(at_budget(Strategy.parse(sentence), 0.3)) == str(Strategy.parse(expected))


@pytest.mark.parametrize(
    ("sentence", "has"), [("full", False), ("offload(host)", False), ("h2o", True), ("infinigen", True)]
)
def test_what_a_fraction_means_something_to(sentence, has):
    assert has_budget(Strategy.parse(sentence)) == has


def test_every_fraction_compares_all_and_equal_answers_are_asked_once():
    sentences = ["h2o(heavy=1, recent=1)", "h2o", "offload(host)", "infinigen", "full", "full | bf16"]
    found = list(compared(sentences, (0.1, 0.5)))
    assert [(strategy.split("(")[0].split(" |")[0], budget) for strategy, budget in found] == [
        *(("full", 1.0), ("full", 1.0)),
        *(("h2o", 0.5), ("full", 0.5)),
        *(("h2o", 0.1), ("full", 0.1)),
    ]
    assert str(Strategy.parse("full | bf16")) in [strategy for strategy, _ in found]


@pytest.mark.parametrize("task", ["needle", "0 keys", "900 keys", "16 key"])
def test_tasks_that_do_not_exist(task):
    with pytest.raises(ConfigError, match=f"unknown task {task!r}"):
        keys_of(task)


def test_tasks():
    assert (keys_of("single needle"), keys_of("16 keys")) == (1, 16)
