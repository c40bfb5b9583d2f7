import json

from tests.unit.cli.running import kvatlas

from kvatlas.cli.strategies import facts, recipe_facts
from kvatlas.core.vocabulary import Axis
from kvatlas.strategies.recipes import RECIPES
from kvatlas.strategies.registry import stages
from kvatlas.strategies.strategy import Strategy

BESIDE = {Axis.ATTEND: " | offload(host)", Axis.BUDGET: " | snapkv(budget=0.25)"}
"""What completes a stage that cannot stand alone."""


def test_json_equals_the_registry():
    listed = json.loads(kvatlas("strategies", "--json").out)
    assert [one["name"] for one in listed] == list(dict.fromkeys(one["name"] for one in listed)), "each name once"
    assert {one["name"] for one in listed} == set(stages()) | set(RECIPES)
    for one in listed:
        stage = stages().get(one["name"])
        assert one == (recipe_facts(one["name"]) if stage is None else facts(stage))


def test_sentences_can_be_used_as_they_are():
    for one in json.loads(kvatlas("strategies", "--json").out):
        stage = stages().get(one["name"])
        beside = BESIDE[stage.axis] if stage is not None and stage().lacks(()) else ""
        assert str(Strategy.parse(one["sentence"] + beside))


def test_a_recipe_is_the_sentence_it_stands_for():
    for name in RECIPES:
        one = recipe_facts(name)
        assert Strategy.parse(one["sentence"]) == Strategy.parse(name)


def test_the_table_shows_every_strategy(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = kvatlas("strategies").out
    for stage in stages().values():
        for text in (str(stage()), stage.info.paper, f"axis: {stage.axis}"):
            assert text in shown


def test_nothing_is_cut_off_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in kvatlas("strategies").out
