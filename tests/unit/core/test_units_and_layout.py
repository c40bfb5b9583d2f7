"""Bytes as users write them, block layouts, model shapes, and names that were nearly right."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from kvatlas.core.errors import ConfigError, UnknownNameError
from kvatlas.core.footprint import Footprint
from kvatlas.core.layout import GRANULE, GROUP, BlockLayout
from kvatlas.core.names import unknown_name
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.streams import ELEMENT_BYTES, SideLayout, Stream
from kvatlas.core.units import format_bytes, format_seconds, parse_bytes
from kvatlas.core.vocabulary import Format


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1g", 2**30), ("1024", 1024), (7, 7), ("1.5KiB", 1536),
        (" 3 kb ", 3000), ("1T", 2**40), ("10B", 10),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-5MiB", "1XB", "1 2", "0", 0, -3, "0.2", "1e3", "nan"])
def test_sizes_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match="memory size"):
        parse_bytes(text)


@given(st.integers(1, 2**50))
def test_plain_integers_are_bytes(size: int) -> None:
    assert parse_bytes(size) == parse_bytes(str(size)) == size


@given(st.integers(0, 2**45))
def test_printed_sizes_are_within_half_a_percent(size: int) -> None:
    number, unit = format_bytes(size).split()
    factor = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert "e" not in number, "nobody reads 1e+03 KiB"
    assert abs(float(number) * factor - size) <= 0.0051 * size


def test_printed_seconds() -> None:
    assert [format_seconds(s) for s in (0.0123, 1, 4.56, 200)] == ["12.3 ms", "1 s", "4.56 s", "3 min 20 s"]


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    format = draw(st.sampled_from(Format))
    return BlockLayout(
        key_dim=draw(st.integers(1, 200)),
        value_dim=draw(st.integers(1, 200)),
        format=format,
        block_size=GROUP if format.is_packed else draw(st.integers(1, 70)),
        positions=draw(st.booleans()),
    )


@given(layouts())
def test_parts_of_a_block_do_not_overlap(layout: BlockLayout) -> None:
    """Codes are at least as long as their bits, parameters as what each format says of them."""
    size, format = layout.block_size, layout.format
    groups = -(-layout.value_dim // GROUP)
    keys, values = (2 * layout.key_dim, 2 * groups * size) if format.is_packed else (size, size)
    if format.is_float:
        keys = values = 0
    starts = [0, layout.key_bytes, layout.key_params_offset, layout.value_params_offset]
    lengths = [size * width * format.bits // 8 for width in (layout.key_dim, layout.value_dim)] + [2 * keys, 2 * values]
    assert starts[2] % 2 == starts[3] % 2 == 0
    parts = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    assert layout.kv_bytes == parts[-1][1]
    assert layout.positions_offset % 4 == 0
    if layout.positions:
        parts.append((layout.positions_offset, layout.positions_offset + 4 * size))
    for (_, end), (start, _) in pairwise(parts):
        assert end <= start
    assert parts[-1][1] <= layout.block_bytes < parts[-1][1] + GRANULE
    assert layout.block_bytes % GRANULE == 0


@given(
    st.lists(
        st.builds(
            Stream, name=st.text(min_size=1), width=st.integers(1, 200), dtype=st.sampled_from([*ELEMENT_BYTES]),
            every=st.sampled_from([1, 2, 5, None]),
        ),
        min_size=1, max_size=5, unique_by=lambda stream: stream.name,
    ),
    st.integers(1, 7).map(lambda tens: 10 * tens),
)  # fmt: skip
def test_streams_of_a_block_do_not_overlap(streams: list[Stream], size: int) -> None:
    layout = SideLayout(tuple(streams), size)
    parts = []
    for stream in streams:
        entries = size // (stream.every or size)
        start, length = layout.offset(stream.name), entries * stream.width * ELEMENT_BYTES[stream.dtype]
        assert start % ELEMENT_BYTES[stream.dtype] == 0 and layout.num_bytes(stream.name) == length
        parts.append((start, start + length))
    assert parts[0][0] == 0 and all(end <= start for (_, end), (start, _) in pairwise(parts))
    assert parts[-1][1] <= layout.block_bytes < parts[-1][1] + GRANULE and layout.block_bytes % GRANULE == 0


@pytest.mark.parametrize(
    ("given", "message"), [({"dtype": "float33"}, "float33"), ({"width": 0}, "width"), ({"every": 0}, "every")]
)
def test_streams_that_cannot_be(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stream(name="norm", **given)


def test_shapes_count_lanes_of_owners_only() -> None:
    own = LayerShape(num_query_heads=8, num_kv_heads=2, key_dim=16, value_dim=8)
    shared = LayerShape(num_query_heads=8, num_kv_heads=2, key_dim=16, value_dim=8, shares_kv_with=0)
    shape = ModelShape(
        name="m", layers=(own, shared, own), hidden_size=1, vocab_size=1, max_positions=1, num_parameters=1
    )
    assert shape.owners == (0, 2) and shape.num_lanes == 4
    assert shape.kv_bytes_per_token(2) == 2 * 2 * (16 + 8) * 2


def test_peak_is_the_larger_of_prompt_and_output() -> None:
    bound = Footprint(prefill_peak_bytes=5, steady_bytes=2, final_bytes=3, read_bytes_per_step=1, sidecar_fraction=0.0)
    assert bound.peak_bytes == 5


def test_near_misses_are_suggested() -> None:
    error = unknown_name("strategy", "h20", ["h2o", "full"])
    assert isinstance(error, UnknownNameError) and str(error) == "unknown strategy 'h20'; did you mean 'h2o'?"
    assert str(unknown_name("strategy", "zzz", ["h2o", "full"])) == "unknown strategy 'zzz'; known: full, h2o"
