"""Stages of others: registered from anywhere, at any time, replaced by their own newer version alone."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

import kvatlas
from kvatlas.core.errors import ConfigError
from kvatlas.core.layout import DEFAULT_BLOCK_SIZE
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format
from kvatlas.strategies.registry import stage_class, stages
from kvatlas.strategies.strategy import Strategy

pytestmark = pytest.mark.usefixtures("own_stages")

LAYER = LayerShape(num_query_heads=2, num_kv_heads=2, key_dim=16, value_dim=16)
SHAPE = ModelShape(name="m", layers=(LAYER,), hidden_size=1, vocab_size=1, max_positions=1, num_parameters=1)


def define(name: str = "mine", module: str | None = None, tokens: int = 8, **facts: object) -> type[kvatlas.Keep]:
    """Return a new class that is registered, as one of ``module`` if that is given."""
    body = {"limits": lambda self, prompt_tokens: kvatlas.Limits.steady(tokens), "__module__": module or __name__}
    kind = types.new_class("Mine", (kvatlas.Keep,), exec_body=lambda space: space.update(body))
    return kvatlas.register(name, **{"summary": "keeps some", **facts})(dataclass(frozen=True, kw_only=True)(kind))


def test_what_is_registered_late_is_found() -> None:
    assert "mine" not in stages()
    mine = define(paper="arXiv:1", saves=(kvatlas.Saves.CAPACITY,))
    assert stages()["mine"] is stage_class("mine") is mine
    assert str(Strategy.parse("mine(layers=0-1) | int8")) == "mine(layers=0-1) | int8"
    assert mine.info == kvatlas.StageInfo(summary="keeps some", paper="arXiv:1", saves=(kvatlas.Saves.CAPACITY,))


def test_facts_may_come_in_one_piece() -> None:
    info = kvatlas.StageInfo(summary="s", paper="p")
    assert define(summary="", info=info).info is info


def test_a_newer_version_takes_its_place_with_its_plans() -> None:
    def kept() -> int | None:
        return Strategy.parse("mine").plan(SHAPE, Format.FP32, DEFAULT_BLOCK_SIZE).layers[0].limits(100).after_prompt

    define(tokens=8)
    assert kept() == 8
    newer = define(tokens=9)
    assert stage_class("mine") is newer and kept() == 9


def test_two_of_one_name_are_refused_and_the_first_stays() -> None:
    first = define(module="theirs")
    with pytest.raises(ConfigError, match="two stages are called 'mine': Mine of theirs and Mine of ours; give one"):
        define(module="ours")
    assert stage_class("mine") is first


@pytest.mark.parametrize("name", ["h2o", "fp16", "infinigen", "int4"])
def test_names_of_ours_are_taken(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*another name"):
        define(name)


def test_names_of_ours_are_taken_before_they_are_loaded() -> None:
    code = "import sys; sys.path.insert(0, '.')\nfrom tests.unit.strategies.test_registry import define\ndefine('h2o')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "two stages are called 'h2o': H2O of kvatlas.strategies.keep.h2o and Mine of" in done.stderr


@pytest.mark.parametrize("name", ["", "a b", "a(b)", "1a", "a|b", "größe"])
def test_names_that_no_sentence_could_say(name: str) -> None:
    if name == "größe":
        define(name)
        assert str(Strategy.parse(name)) == name
        return
    with pytest.raises(ConfigError, match="a strategy cannot be called"):
        define(name)


def test_what_is_no_stage() -> None:
    decorate = kvatlas.register("mine", summary="s")
    with pytest.raises(ConfigError, match=r"which is no stage; derive it from kvatlas\.Keep"):
        decorate(int)
    with pytest.raises(ConfigError, match="which is no stage"):
        decorate(kvatlas.Stage)
    needy = dataclass(frozen=True, kw_only=True)(type("Needy", (kvatlas.Keep,), {"__annotations__": {"budget": int}}))
    with pytest.raises(ConfigError, match=r"Needy of .* give its parameter 'budget' a default"):
        decorate(needy)
    plain = type("Plain", (kvatlas.Keep,), {})
    with pytest.raises(ConfigError, match=r"Plain of .* is no dataclass yet; write @dataclass"):
        decorate(plain)


def test_facts_are_given_once() -> None:
    info = kvatlas.StageInfo(summary="s", paper="p")
    for facts in ({}, {"summary": "s", "info": info}, {"info": info, "saves": ()}):
        with pytest.raises(ConfigError, match="'mine' wants summary="):
            kvatlas.register("mine", **facts)
