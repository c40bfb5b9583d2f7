"""Stages that place and rehearse: sentences, refusals, what they declare, and the bytes they promise."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, strategies as st

from kvatlas.core.errors import CompositionError, ConfigError, UnknownNameError
from kvatlas.core.footprint import Footprint
from kvatlas.core.needs import LayerInputs
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Axis, Format, Moment, Tier
from kvatlas.strategies.attend.rehearse import Rehearse
from kvatlas.strategies.place.offload import Offload
from kvatlas.strategies.stage import Attend, Place
from kvatlas.strategies.strategy import Strategy

fraction = st.floats(0, 1, exclude_min=True)
speculations = st.builds(
    Rehearse,
    alpha=st.floats(0, 1e6) | st.just(math.inf),
    cap=fraction,
    partial=fraction,
    dense=st.integers(1, 9),
)
places = st.builds(Offload, prefetch=st.booleans())


def uniform(layers: int = 8) -> ModelShape:
    one = LayerShape(num_query_heads=4, num_kv_heads=2, key_dim=64, value_dim=64)
    return ModelShape(
        name="m", layers=(one,) * layers, hidden_size=256, vocab_size=9, max_positions=10**6, num_parameters=1
    )


def test_sentences_from_before_a_stage_was_renamed_still_mean_the_same() -> None:
    former = Strategy.parse("speculate(alpha=2.0, cap=0.5) | offload(host)")
    assert former == Strategy.parse("rehearse(alpha=2.0, cap=0.5) | offload(host)") and "rehearse(" in str(former)


def bound(strategy: str, prompt: int = 4000, output: int = 100, chunk: int = 512) -> Footprint:
    return Strategy.parse(strategy).plan(uniform(), Format.FP32).footprint(prompt, output, chunk)


@given(speculations, places, st.sampled_from(["", " | fp16"]), st.randoms())
def test_sentences_parse_back_in_any_order(rehearse: Rehearse, offload: Offload, encode: str, order: random.Random):
    strategy = Strategy.parse(f"{rehearse} | {offload}{encode}")
    assert (strategy.on(Axis.ATTEND), strategy.on(Axis.PLACE)) == ([rehearse], [offload])
    parts = str(strategy).split(" | ")
    order.shuffle(parts)
    again = Strategy.parse(" | ".join(parts))
    assert again == strategy and str(again) == str(strategy) and hash(again) == hash(strategy)


def test_short_forms() -> None:
    assert Strategy.parse("offload") == Strategy.parse("offload(host)") == Strategy.parse("full | offload(to=host)")
    assert Strategy.parse("offload(host, false)") == Strategy.parse("offload(prefetch=false)")
    assert Strategy.parse("offload(prefetch=false)") != Strategy.parse("offload")
    assert Strategy.parse("rehearse(inf, 1) | offload").on(Axis.ATTEND) == [Rehearse(alpha=math.inf, cap=1.0)]
    assert Strategy.parse("infinigen") == Strategy.parse("offload | rehearse")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("rehearse(alpha=-1) | offload", ConfigError, "rehearse: alpha=-1.0 is out of range; write a number of at"),
        ("rehearse(alpha=nan) | offload", ConfigError, "rehearse: alpha=nan is out of range"),
        ("rehearse(alpha=some) | offload", ConfigError, "rehearse: alpha wants float, got 'some'"),
        ("rehearse(cap=0) | offload", ConfigError, "rehearse: cap=0.0 is out of range; write a fraction in (0, 1]"),
        ("rehearse(cap=1.1) | offload", ConfigError, "rehearse: cap=1.1 is out of range"),
        ("rehearse(cap=nan) | offload", ConfigError, "rehearse: cap=nan is out of range"),
        ("rehearse(partial=0) | offload", ConfigError, "rehearse: partial=0.0 is out of range"),
        ("rehearse(partial=2) | offload", ConfigError, "rehearse: partial=2.0 is out of range"),
        ("rehearse(dense=0) | offload", ConfigError, "rehearse: dense=0 is out of range"),
        ("rehearse(beta=2) | offload", UnknownNameError, "unknown parameter of rehearse 'beta'"),
        ("reherase | offload", UnknownNameError, "did you mean 'rehearse'?"),
        ("offload(disk)", ConfigError, "offload cannot place keys and values on 'disk'; write offload(host)"),
        ("offload(device)", ConfigError, "offload cannot place keys and values on 'device'"),
        ("offload(prefetch=1)", ConfigError, "offload: prefetch wants bool, got '1'"),
        ("offload(host, prefetch=maybe)", ConfigError, "offload: prefetch wants bool, got 'maybe'"),
        ("offload | offload(host, false)", CompositionError, "both answer the axis 'place'"),
        ("infinigen | offload", CompositionError, "both answer the axis 'place'"),
        ("rehearse", CompositionError, "'rehearse' cannot stand alone: it chooses what to fetch"),
        ("rehearse | fp16", CompositionError, "add '| offload(host)'"),
        ("h2o | infinigen", CompositionError, "'rehearse' and 'h2o' cannot be composed: it counts the attention"),
        ("h2o | quest", CompositionError, "it counts the attention that every token gets"),
        ("kivi | rehearse | offload", CompositionError, "leave one out"),
        ("streaming_llm | rehearse | offload", CompositionError, "it drops tokens at every step"),
    ],
)
def test_refused(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as refusal:
        Strategy.parse(text)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_they_declare() -> None:
    offload, infinigen = Strategy.parse("offload"), Strategy.parse("infinigen")
    assert offload.traits.exact and moments(offload) == {Moment.BEFORE_LAYER}
    assert all(layer.store.side is None for layer in offload.plan(uniform(), Format.FP32).layers)
    (place,) = offload.on(Axis.PLACE)
    assert isinstance(place, Place) and (place.axis, place.tier) == (Axis.PLACE, Tier.HOST)
    assert place.fetches_ahead and not Offload(prefetch=False).fetches_ahead
    assert not infinigen.traits.exact and LayerInputs() in infinigen.needs
    assert moments(infinigen) == {Moment.BEFORE_LAYER, Moment.SELECT}
    ((keep,), (attend,)) = infinigen.on(Axis.KEEP), infinigen.on(Axis.ATTEND)
    assert isinstance(attend, Attend) and keep.name == "full"
    for layer in infinigen.plan(uniform(), Format.FP32).layers:
        (stream,) = layer.store.side.streams if layer.store.side is not None else (None,)
        assert (stream is None) == (layer.index == 0) and not layer.store.derived
        assert stream is None or (stream.name, stream.width) == ("partial", round(0.3 * layer.shape.key_dim))
    assert not Strategy.parse("h2o | offload").traits.exact and not Strategy.parse("fp16 | offload").traits.exact


def moments(strategy: Strategy) -> frozenset[Moment]:
    return frozenset().union(*(stage.moments for stage in strategy.stages))


def test_which_layers_live_on_the_host() -> None:
    own = LayerShape(num_query_heads=2, num_kv_heads=1, key_dim=4, value_dim=4)
    shared = LayerShape(num_query_heads=2, num_kv_heads=1, key_dim=4, value_dim=4, shares_kv_with=0)
    shape = ModelShape(
        name="m", layers=(own, shared, own), hidden_size=8, vocab_size=9, max_positions=99, num_parameters=1
    )
    on_host = {
        sentence: Strategy.parse(sentence).plan(shape, Format.FP32).cache.host_layers
        for sentence in ("full", "offload", "infinigen", "rehearse(dense=3) | offload")
    }
    assert on_host["full"] == ()
    assert on_host["offload"] == (0, 2)
    assert on_host["infinigen"] == (2,), "the first layer is dense"
    assert on_host["rehearse(dense=3) | offload"] == ()


@given(fraction, st.integers(1, 10**5))
def test_the_cap_in_tokens(cap: float, cached: int) -> None:
    most = Rehearse(cap=cap).most_read(cached, group=1)
    assert 1 <= most <= cached and cap * cached - 1e-5 <= most < max(2, cap * cached + 1)


def test_caps_that_are_no_binary_fractions() -> None:
    caps = (0.1, 0.2, 0.3, 0.6, 0.7, 0.9, 1.0)
    assert [Rehearse(cap=cap).most_read(10, group=1) for cap in caps] == [1, 2, 3, 6, 7, 9, 10]
    assert [Rehearse(cap=cap).most_read(10, group=4) for cap in caps] == [4, 4, 4, 6, 7, 9, 10], "each head its best"
    assert Rehearse(cap=0.1).most_read(3, group=4) == 3


# What they promise


def test_offload_frees_the_device_and_fills_the_host() -> None:
    full, offload = bound("full"), bound("offload")
    assert full.host_bytes == full.moved_bytes_per_step == 0
    assert offload.host_bytes == full.peak_bytes, "the same blocks, elsewhere"
    two_of_eight = full.peak_bytes / 4
    assert two_of_eight <= offload.peak_bytes <= 1.02 * two_of_eight, "two layers visit at a time"
    assert offload.read_bytes_per_step == full.read_bytes_per_step
    assert offload.moved_bytes_per_step == full.final_bytes


def test_infinigen_keeps_one_layer_a_sketch_and_what_it_fetched() -> None:
    full, infinigen = bound("full"), bound("infinigen")
    layer = full.final_bytes / 8
    sketch = 7 * layer * 0.3 / 2  # of keys only
    buffers = 2 * layer * 0.2
    assert infinigen.final_bytes == pytest.approx(layer + sketch + buffers, rel=0.05)
    assert infinigen.steady_bytes < full.steady_bytes / 2
    assert infinigen.prefill_peak_bytes > infinigen.final_bytes, "prompts pass through whole layers"
    assert infinigen.host_bytes == pytest.approx(7 * layer, rel=0.01)
    assert infinigen.moved_bytes_per_step == pytest.approx(0.2 * 7 / 8 * full.read_bytes_per_step, rel=0.02)
    assert infinigen.read_bytes_per_step < 0.5 * full.read_bytes_per_step


@pytest.mark.parametrize("keep", ["h2o(heavy=0.1, recent=0.1)", "streaming_llm(recent=0.2)", "snapkv(budget=0.2)"])
def test_what_is_cut_is_cut_on_the_host_too(keep: str) -> None:
    kept, offloaded = bound(keep), bound(f"{keep} | offload")
    store = Strategy.parse(keep).plan(uniform(), Format.FP32).layers[0].store
    beside = 0 if store.side is None else store.side.block_bytes  # which stays on the device
    share = store.own.block_bytes / (store.own.block_bytes + beside)
    assert offloaded.host_bytes == share * kept.peak_bytes
    assert offloaded.final_bytes < 0.3 * kept.final_bytes
    assert offloaded.moved_bytes_per_step == share * kept.final_bytes


def test_layers_that_share_are_fetched_for_each_reader() -> None:
    own = LayerShape(num_query_heads=4, num_kv_heads=2, key_dim=64, value_dim=64)
    shared = LayerShape(num_query_heads=4, num_kv_heads=2, key_dim=64, value_dim=64, shares_kv_with=1)
    shape = ModelShape(
        name="m", layers=(own, own, shared), hidden_size=256, vocab_size=9, max_positions=999, num_parameters=1
    )
    found = Strategy.parse("offload").plan(shape, Format.FP32).footprint(64, 32, 64)
    assert found.moved_bytes_per_step == found.host_bytes * 3 / 2
