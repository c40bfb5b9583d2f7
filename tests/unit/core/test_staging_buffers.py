"""Which buffer on the device each layer on the host is read through."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, strategies as st

from kvatlas.core.layout import BlockLayout, layout_of, staging_buffers
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format

KINDS = [(1, 4, 4), (2, 4, 4), (2, 8, 4)]


def blocks(shape: ModelShape, hosted) -> dict[int, BlockLayout]:
    """Return the layouts of layers on the host, all in one format."""
    return {i: layout_of(shape.layers[i], Format.FP32, 32) for i in hosted}


def test_blocks_of_different_layouts_do_not_visit_through_one_buffer() -> None:
    layer = LayerShape(num_query_heads=2, num_kv_heads=1, key_dim=4, value_dim=4)
    shape = ModelShape(name="m", layers=(layer,) * 4, hidden_size=8, vocab_size=9, max_positions=9, num_parameters=1)
    other = layout_of(layer, Format.FP16, 32)
    assert staging_buffers(shape, blocks(shape, (0, 1)) | {2: other, 3: other}) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert staging_buffers(shape, blocks(shape, (0,)) | {2: other}) == {0: 0, 2: 2}


def kind_of(layer: LayerShape) -> tuple[int, int, int]:
    return layer.num_kv_heads, layer.key_dim, layer.value_dim


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    """Return layers of several kinds, some of which share the lanes of an earlier one."""
    layers: list[LayerShape] = []
    for _ in range(draw(st.integers(1, 12))):
        owners = [index for index, layer in enumerate(layers) if layer.shares_kv_with is None]
        shares = draw(st.sampled_from([None, None, *owners]))
        heads, key, value = draw(st.sampled_from(KINDS)) if shares is None else kind_of(layers[shares])
        layers.append(
            LayerShape(
                num_query_heads=2 * heads,
                num_kv_heads=heads,
                key_dim=key,
                value_dim=value,
                window=draw(st.sampled_from([None, 6])),
                shares_kv_with=shares,
            )
        )
    return ModelShape(name="m", layers=tuple(layers), hidden_size=8, vocab_size=9, max_positions=99, num_parameters=1)


@given(models(), st.data())
def test_layers_of_a_kind_take_turns(shape: ModelShape, data: st.DataObject) -> None:
    hosted = data.draw(st.sets(st.sampled_from(shape.owners)))
    buffers = staging_buffers(shape, blocks(shape, hosted))
    sources = enumerate(layer.shares_kv_with for layer in shape.layers)
    owner = [index if source is None else source for index, source in sources]
    assert sorted(buffers) == [index for index in range(len(shape.layers)) if owner[index] in hosted]
    for reader, buffer in buffers.items():
        assert buffer in hosted, "a buffer is named by a layer on the host"
        assert kind_of(shape.layers[buffer]) == kind_of(shape.layers[reader]), "what is read would not fit"
    for kind in KINDS:
        readers = [index for index in buffers if kind_of(shape.layers[index]) == kind]
        owners = [index for index in hosted if kind_of(shape.layers[index]) == kind]
        assert {buffers[index] for index in readers} <= set(sorted(owners)[:2]), "at most two, the first ones"
        if len(owners) >= 2:
            assert all(buffers[one] != buffers[two] for one, two in pairwise(readers)), "one is filled, one is read"


def test_an_offloaded_layer_and_those_that_share_it() -> None:
    own = LayerShape(num_query_heads=2, num_kv_heads=1, key_dim=4, value_dim=4)
    shared = LayerShape(num_query_heads=2, num_kv_heads=1, key_dim=4, value_dim=4, shares_kv_with=1)
    shape = ModelShape(
        name="m", layers=(own, own, own, shared), hidden_size=8, vocab_size=9, max_positions=99, num_parameters=1
    )
    assert staging_buffers(shape, blocks(shape, (0, 1, 2))) == {0: 0, 1: 1, 2: 0, 3: 1}
    assert staging_buffers(shape, blocks(shape, (1, 2))) == {1: 1, 2: 2, 3: 1}
    assert staging_buffers(shape, blocks(shape, (1,))) == {1: 1, 3: 1}, "a single buffer serves one after another"
    assert staging_buffers(shape, blocks(shape, ())) == {}
