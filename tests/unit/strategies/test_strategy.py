"""Composition: sentences, defaults, recipes, refusals, and the tables that are read from the stages."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

import pytest
from hypothesis import given, strategies as st

from kvatlas.core.errors import CompositionError, ConfigError, UnknownNameError
from kvatlas.core.grammar import format_value
from kvatlas.core.plan import INEXACT, NEUTRAL, NOTHING
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Axis, Format, Moment
from kvatlas.strategies.keep.full import Full
from kvatlas.strategies.keep.h2o import H2O
from kvatlas.strategies.keep.streaming_llm import StreamingLLM
from kvatlas.strategies.recipes import RECIPES
from kvatlas.strategies.registry import stage_class, stages
from kvatlas.strategies.stage import Encode, Keep, Received, Stage, StageInfo, tokens_of
from kvatlas.strategies.strategy import Strategy

SHAPE = ModelShape(
    name="m", layers=(LayerShape(num_query_heads=2, num_kv_heads=1, key_dim=4, value_dim=4),), hidden_size=8,
    vocab_size=9, max_positions=99, num_parameters=1,
)  # fmt: skip

share = st.one_of(st.integers(1, 10**6), st.floats(0, 1, exclude_min=True))
keeps = st.one_of(
    st.just(Full()),
    st.builds(H2O, heavy=share, recent=share),
    st.builds(StreamingLLM, sinks=st.integers(0, 100), recent=share),
)
encodes = st.sampled_from([stage() for stage in stages().values() if issubclass(stage, Encode)])
composed = st.builds(lambda *stages: Strategy(stages), keeps, encodes) | st.builds(
    lambda keep: Strategy((keep,)), keeps
)


@given(composed)
def test_what_is_printed_parses_back(strategy: Strategy) -> None:
    again = Strategy.parse(str(strategy))
    assert again == strategy and hash(again) == hash(strategy) and str(again) == str(strategy)
    assert [type(stage) for stage in again.stages] == [type(stage) for stage in strategy.stages]
    for stage, other in zip(again.stages, strategy.stages, strict=True):
        for field in dataclasses.fields(stage):
            assert type(getattr(stage, field.name)) is type(getattr(other, field.name))


@given(composed, st.randoms())
def test_order_of_stages_does_not_matter(strategy: Strategy, random) -> None:
    parts = str(strategy).split(" | ")
    random.shuffle(parts)
    assert Strategy.parse(" | ".join(parts)) == strategy


def test_tokens_and_fractions_are_different_strategies() -> None:
    """1 == 1.0 in Python, but one token is not the whole prompt."""
    assert Strategy.parse("h2o(heavy=1, recent=1)") != Strategy.parse("h2o(heavy=1.0, recent=1.0)")
    assert len({Strategy.parse("h2o(heavy=1)"), Strategy.parse("h2o(heavy=1.0)")}) == 2


def test_without_a_keep_stage_every_token_stays() -> None:
    assert str(Strategy.parse("fp16")) == "full | fp16"
    assert Strategy(()) == Strategy.parse("full")
    assert Strategy.parse("fp16").on(Axis.KEEP) == [Full()]


def test_positional_parameters_follow_the_order_of_the_fields() -> None:
    assert Strategy.parse("streaming_llm(2, recent=9)") == Strategy.parse("streaming_llm(sinks=2, recent=9)")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("h20", UnknownNameError, "unknown strategy 'h20'; did you mean 'h2o'?"),
        ("streamingllm", UnknownNameError, "did you mean 'streaming_llm'?"),
        ("full | pf16", UnknownNameError, "did you mean"),
        ("zzzzzz", UnknownNameError, "known: "),
        ("h2o(hevy=0.1)", UnknownNameError, "unknown parameter of h2o 'hevy'; did you mean 'heavy'?"),
        ("h2o(0.1, heavy=0.1)", ConfigError, "given twice"),
        ("h2o(1, 2, 3)", ConfigError, "h2o takes 2 parameter(s), got 3"),
        ("full(1)", ConfigError, "full takes 0 parameter(s), got 1"),
        ("h2o(heavy=0)", ConfigError, "h2o: heavy=0 is out of range"),
        ("h2o(heavy=1.5)", ConfigError, "h2o: heavy=1.5 is out of range"),
        ("h2o(recent=-0.1)", ConfigError, "h2o: recent=-0.1 is out of range"),
        ("h2o(recent=nan)", ConfigError, "h2o: recent=nan is out of range"),
        ("h2o(recent=inf)", ConfigError, "h2o: recent=inf is out of range"),
        ("h2o(heavy=true)", ConfigError, "h2o: heavy wants int or float, got 'true'"),
        ("h2o(heavy=many)", ConfigError, "h2o: heavy wants int or float, got 'many'"),
        ("streaming_llm(sinks=1.0)", ConfigError, "streaming_llm: sinks wants int, got '1.0'"),
        ("streaming_llm(sinks=-1)", ConfigError, "streaming_llm: sinks=-1 is out of range"),
        ("streaming_llm(recent=0)", ConfigError, "streaming_llm: recent=0 is out of range"),
        ("full | h2o", CompositionError, "'full' and 'h2o' cannot be composed: both answer the axis 'keep'"),
        ("h2o | fp16 | bf16", CompositionError, "both answer the axis 'encode'"),
    ],
)
def test_refused(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as refusal:
        Strategy.parse(text)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_stages_may_refuse_each_other() -> None:
    class Jealous(Encode):
        name: ClassVar[str] = "jealous"
        info: ClassVar[StageInfo] = StageInfo(summary="", paper="")

        @property
        def format(self) -> Format:
            return Format.FP16

        def conflict(self, other: Stage) -> str | None:
            return "it wants to be alone" if isinstance(other, H2O) else None

    with pytest.raises(CompositionError, match="'jealous' and 'h2o' cannot be composed: it wants to be alone"):
        Strategy((H2O(), Jealous()))
    (only,) = Strategy((Jealous(),)).plan(SHAPE, Format.FP32).layers
    assert only.store.own.format is Format.FP16


def test_what_a_strategy_declares() -> None:
    h2o = Strategy.parse("h2o | bf16")
    (keep,), (stored,) = h2o.on(Axis.KEEP), (layer.store for layer in h2o.plan(SHAPE, Format.FP32).layers)
    assert isinstance(keep, Keep) and keep.received == Received() and h2o.needs == keep.needs == (Received(),)
    assert stored.side is not None and [stream.name for stream in stored.side.streams] == ["received"]
    assert keep.moments == {Moment.AFTER_PREFILL, Moment.AFTER_STEP}
    assert stored.own.format is Format.BF16 and h2o.traits == NOTHING
    full = Strategy.parse("full")
    (stored,) = (layer.store for layer in full.plan(SHAPE, Format.FP32).layers)
    assert full.traits == NEUTRAL and not full.on(Axis.ENCODE) and stored.side is None
    assert not full.needs and not any(stage.moments or stage.needs for stage in full.stages)
    assert Strategy.parse("full | fp16").traits == INEXACT and not INEXACT.exact
    assert Strategy.parse("full | fp32").traits.exact


@given(share, st.integers(1, 10**5))
def test_shares_are_tokens(value: int | float, prompt: int) -> None:
    tokens = tokens_of(value, prompt)
    assert tokens >= 1
    assert tokens == value if isinstance(value, int) else abs(tokens - value * prompt) <= 1


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resolve(name: str) -> None:
    recipe = RECIPES[name]
    assert Strategy.parse(name) == Strategy.parse(recipe.sentence)
    for stage in Strategy.parse(name).stages:
        for field in dataclasses.fields(stage):
            value = getattr(stage, field.name)
            spelt = f"{field.name}={format_value(value)}" in recipe.sentence
            assert spelt or not isinstance(value, float), "a recipe spells its fractions out"
    assert recipe.paper and recipe.label


@pytest.mark.parametrize("name", stages())
def test_every_stage_is_documented(name: str) -> None:
    stage = stage_class(name)
    assert stage.name == name and stage.axis in Axis
    assert stage.info.summary and "\n" not in stage.info.summary and stage.info.paper
    assert stage.__doc__ and not stage.__doc__.startswith(f"{stage.__name__}("), "dataclass made the docstring"
    for field in stage.parameters():
        assert re.search(rf"^\s+{field.name}: ", stage.__doc__, re.MULTILINE), f"{name}: {field.name} is not explained"
    beside = {Axis.ATTEND: " | offload", Axis.BUDGET: " | snapkv(budget=0.25)"}
    companion = beside[stage.axis] if stage().lacks([]) else ""
    assert Strategy.parse(name + companion).stages, "usable by name alone, beside what it needs"
    default = Strategy.parse(f"{stage()}{companion}")
    assert Strategy.parse(name + companion) == Strategy.parse(str(default)) == default


@pytest.mark.parametrize("text", [None, 3.0, b"full", ["full"], {}, object()], ids=lambda text: type(text).__name__)
def test_what_is_no_sentence_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=f"got {type(text).__name__}"):
        Strategy.parse(text)
