import json

from tests.unit.cli.running import kvatlas

from kvatlas.cli.strategies import facts
from kvatlas.strategies.registry import stages
from kvatlas.strategies.strategy import Strategy


def test_json_equals_the_registry():
    listed = json.loads(kvatlas("strategies", "--json").out)
    assert {one["name"] for one in listed} == set(stages())
    for one in listed:
        assert one == facts(stages()[one["name"]])


def test_sentences_can_be_used_as_they_are():
    for one in json.loads(kvatlas("strategies", "--json").out):
        assert one["sentence"] in str(Strategy.parse(one["sentence"]))


def test_the_table_shows_every_strategy(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = kvatlas("strategies").out
    for stage in stages().values():
        for text in (str(stage()), stage.info.paper, f"axis: {stage.axis}"):
            assert text in shown


def test_nothing_is_cut_off_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in kvatlas("strategies").out
