from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.unit.kernels.fast_forms import Form, running_forms
from tests.unit.kernels.lanes import Lanes, close, dense, make_lanes, peak_bytes, read

from kvatlas.core.vocabulary import Format
from kvatlas.kernels import tiles
from kvatlas.kernels.chunk_attention import ChunkRows, chunk_attention, native, reference, torch_path
from kvatlas.kernels.pool import BlockPool, Part

LIMITS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 11},
    {"reach": (3, 7)},
    {"reach": (0, 1)},
    {"window": 30, "reach": (20, 5)},
]


def chunk(T: int, H: int, G: int, D: int, E: int | None = None, first: int = 0) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(T, H * G, D), torch.randn(T, H, D), torch.randn(T, H, E or D)
    return q, k, v, torch.arange(first, first + T)


def alone(form: Form) -> Form:
    """Return a form that takes the chunk of one sequence, as the reference does."""

    def of_one(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, past: list[Part], **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = ChunkRows(start=0, count=len(q), positions=positions, past=past, reach=options.pop("reach", None))
        out, (lse,) = form(q, k, v, [rows], **options)
        return out, lse

    return of_one


one_chunk = alone(chunk_attention)
NATIVE = [alone(form) for form in running_forms(torch_path, native, "chunk_attention")[1:]]
NO_LIMITS: dict[str, Any] = {"softcap": None, "sinks": None, "window": None, "reach": None}


def attend(own: tuple[torch.Tensor, ...], lanes: Lanes, form: Any = one_chunk, **options: Any) -> Any:
    lanes = dense(lanes, options.pop("dense_start", None))
    options = {"scale": own[0].shape[-1] ** -0.5, "tile_slots": 16} | options
    if form is not one_chunk:
        options = NO_LIMITS | options
    return form(*own, [lanes.part], **options)


def check(own: tuple[torch.Tensor, ...], lanes: Lanes, forms: Sequence[Form] | None = None, **options: Any) -> None:
    want_out, want_lse = attend(own, lanes, reference.chunk_attention, **options)
    covered = NATIVE if native.covers(own[0], own[2]) else []
    for form in (torch_path.chunk_attention, *covered) if forms is None else forms:
        out, lse = attend(own, lanes, form, **options)
        assert out.dtype == own[0].dtype and lse.dtype == torch.float32
        close(lse, want_lse)
        loose = 1.5e-2 if out.dtype in (torch.bfloat16, torch.float16) else 2e-5
        close(out, want_out, atol=loose, rtol=max(loose, 2e-4))


@pytest.mark.parametrize("tokens", [1, 7, 63])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 32), (3, 60), (16, 128)])
@pytest.mark.parametrize("lengths", [(45, 45), (45, 16), (0, 33), (1, 1), (0, 0)])
def test_agrees_with_the_reference(tokens: int, group: int, head_dim: int, lengths: tuple[int, int]) -> None:
    torch.manual_seed(tokens + group)
    check(chunk(tokens, 2, group, head_dim, first=60), make_lanes(lengths, key_dim=head_dim, end=60))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("lengths", "dense_start"), [((45, 45), None), ((45, 16), None), ((45, 45), 0), ((40, 40), 5)])
@pytest.mark.parametrize("value_dim", [32, 20])
def test_options_agree_with_the_reference(
    limits: dict[str, Any],
    softcap: float | None,
    with_sinks: bool,
    lengths: tuple[int, int],
    dense_start: int | None,
    value_dim: int,
) -> None:
    torch.manual_seed(1)
    lanes = make_lanes(lengths, value_dim=value_dim, dense_start=dense_start, end=45)
    own = chunk(19, 2, 3, 32, value_dim, first=45)
    sinks = torch.randn(6) if with_sinks else None
    check(own, lanes, softcap=softcap, sinks=sinks, dense_start=dense_start, **limits)


@pytest.mark.parametrize("format", [Format.BF16, Format.FP16, Format.FP32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("limits", [{}, {"window": 20}, {"softcap": 3.0}])
def test_formats_agree_with_the_reference(format: Format, dtype: torch.dtype, limits: dict[str, Any]) -> None:
    torch.manual_seed(2)
    q, k, v, positions = chunk(9, 2, 2, 32, first=30)
    lanes = make_lanes((30, 17), format=format, end=30)
    check((q.to(dtype), k.to(dtype), v.to(dtype), positions), lanes, **limits)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_small_steps_split_queries_without_a_trace(
    limits: dict[str, Any], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "STEP_BYTES", 1000)
    torch.manual_seed(3)
    lanes = make_lanes((45, 45), dense_start=0)
    for dense_start in (0, None):
        check(chunk(37, 2, 3, 32, first=45), lanes, softcap=softcap, dense_start=dense_start, **limits)


@pytest.mark.parametrize("limits", LIMITS)
def test_ranges_that_nobody_looked_at_only_cost_masks(limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where looking would wait for the device."""
    stored = tiles._stored_positions

    def unseen(*args: Any) -> Any:
        return tiles._Keys(stored(*args).positions, (0, tiles.NO_TOKEN))

    monkeypatch.setattr(tiles, "_stored_positions", unseen)
    monkeypatch.setattr(torch_path, "has_flash", lambda *_: False)
    torch.manual_seed(4)
    check(chunk(19, 2, 3, 32, first=45), make_lanes((45, 20), end=45), **limits)


def test_reference_is_plain_attention_on_a_dense_case() -> None:
    torch.manual_seed(5)
    lanes = make_lanes((21, 21), dense_start=0)
    q, k, v, positions = chunk(13, 2, 3, 32, first=21)
    out, lse = attend((q, k, v, positions), lanes, reference.chunk_attention)
    keys, values = (
        torch.cat([torch.stack([read(pool, lanes, h) for h in range(2)]), own.transpose(0, 1)], dim=1)
        for pool, own in ((lanes.k_pool, k), (lanes.v_pool, v))
    )
    visible = torch.arange(34) <= positions[:, None]
    heads = q.transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(
        heads[None], keys[None], values[None], attn_mask=visible, enable_gqa=True
    )
    close(out, want[0].transpose(0, 1))
    scores = heads @ keys.repeat_interleave(3, 0).transpose(1, 2) * 32**-0.5
    close(lse, scores.masked_fill(~visible, -torch.inf).logsumexp(-1))


def test_a_slot_without_a_token_is_hidden_even_if_it_holds_nan() -> None:
    torch.manual_seed(6)
    lanes = make_lanes((20, 13), end=20)
    for h, slot in ((0, 0), (0, 17), (1, 9)):
        block = lanes.table[h, slot // 8]
        lanes.pos_pool[block, slot % 8] = -1
        lanes.k_pool[block, slot % 8] = lanes.v_pool[block, slot % 8] = torch.nan
    for limits in LIMITS:
        check(chunk(5, 2, 2, 32, first=20), lanes, **limits)


def test_a_past_later_than_some_queries_is_hidden_from_them() -> None:
    torch.manual_seed(7)
    lanes = make_lanes((20, 20), end=20)
    for limits in LIMITS:
        check(chunk(9, 2, 2, 32, first=8), lanes, **limits)


@pytest.mark.parametrize("limits", [{"window": 100}, {"window": 700}, {"reach": (5, 90)}])
@pytest.mark.parametrize("dense_start", [0, None])
def test_masks_that_hide_whole_runs_inside_a_tile(limits: dict[str, Any], dense_start: int | None) -> None:
    """The flash kernel works on 512 keys at a time, of which a query may see none."""
    torch.manual_seed(9)
    lanes = make_lanes((1400, 1400), block_size=32, dense_start=0)
    own = chunk(40, 2, 3, 32, first=1400)
    options = limits | {"dense_start": dense_start, "tile_slots": 2048}
    got = attend(own, lanes, **options)
    close(got, attend(own, lanes, reference.chunk_attention, **options))


def test_queries_that_see_nothing_give_zeros() -> None:
    q, k, v, positions = chunk(3, 1, 2, 32, first=10)
    lanes = make_lanes((8,), dense_start=0)
    for softcap in (None, 2.0):
        out, lse = attend((q, k, v, positions), lanes, window=0, softcap=softcap)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_positions_in_any_order_and_with_gaps() -> None:
    torch.manual_seed(8)
    q, k, v, _ = chunk(9, 2, 2, 32)
    lanes = make_lanes((20, 20), end=20)
    for positions in ([20, 22, 23, 30, 31, 40, 41, 50, 60], [25, 24, 23, 22, 21, 20, 26, 28, 27], [20] * 9):
        for limits in LIMITS:
            check((q, k, v, torch.tensor(positions)), lanes, **limits)


@pytest.mark.parametrize(("limits", "reads"), [({"window": 16}, 1), ({"reach": (8, 8)}, 2), ({}, 8)])
def test_dense_tiles_out_of_sight_are_not_read(
    limits: dict[str, Any], reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    read_entries = tiles.read_entries

    def counting(pool: BlockPool, which: Any, *args: Any) -> torch.Tensor:
        seen.append(which)
        return read_entries(pool, which, *args)

    monkeypatch.setattr(tiles, "read_entries", counting)
    monkeypatch.setattr(tiles, "gather_slots", lambda *_: pytest.fail("positions were read"))
    lanes = make_lanes((128, 128), dense_start=0)
    attend(chunk(4, 2, 2, 32, first=128), lanes, torch_path.chunk_attention, dense_start=0, **limits)
    assert sorted(seen) == ["keys"] * reads + ["values"] * reads


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 40),
    cut=st.integers(1, 39),
    tile_slots=st.sampled_from([1, 8, 24]),
    limits=st.sampled_from(LIMITS),
    dense=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
)
def test_chunks_equal_the_whole(
    tokens: int, cut: int, tile_slots: int, limits: dict[str, Any], dense: bool, softcap: float | None
) -> None:
    cut = min(cut, tokens - 1)
    torch.manual_seed(tokens * 40 + cut)
    own = chunk(tokens, 2, 3, 32)
    options = limits | {"tile_slots": tile_slots, "softcap": softcap, "sinks": torch.randn(6)}
    whole = attend(own, make_lanes((0, 0)), **options)
    head, tail = split(own, cut)
    first = attend(head, make_lanes((0, 0)), **options)
    second = attend(tail, stored(head), dense_start=0 if dense else None, **options)
    close(torch.cat([first[0], second[0]]), whole[0])
    close(torch.cat([first[1], second[1]], dim=1), whole[1])


def split(own: tuple[torch.Tensor, ...], cut: int) -> tuple[tuple[torch.Tensor, ...], ...]:
    return tuple(x[:cut] for x in own), tuple(x[cut:] for x in own)


def stored(own: tuple[torch.Tensor, ...]) -> Lanes:
    """Lanes that hold a chunk's keys and values in order."""
    _, k, v, positions = own
    lanes = make_lanes([len(positions)] * k.shape[1], dense_start=int(positions[0]))
    for h in range(k.shape[1]):
        for i in range(len(positions)):
            lanes.k_pool[lanes.table[h, i // 8], i % 8] = k[i, h]
            lanes.v_pool[lanes.table[h, i // 8], i % 8] = v[i, h]
    return lanes


def test_rows_may_lie_in_any_order_in_memory() -> None:
    torch.manual_seed(0)
    *tensors, positions = chunk(20, 2, 2, 32)
    scattered = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in tensors]
    assert all(x.stride(-1) != 1 for x in scattered)
    for own in (tensors, scattered):
        expected = reference.chunk_attention(
            *own, positions, [], scale=0.2, softcap=None, sinks=None, window=None, reach=None, tile_slots=16
        )
        for form in (one_chunk, *NATIVE):
            for got, wanted in zip(form(*own, positions, [], scale=0.2), expected, strict=True):
                close(got, wanted, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 700}])
def test_memory_does_not_grow_with_the_past(options: dict[str, Any]) -> None:
    own = chunk(64, 2, 2, 32, first=4096)
    for form in (torch_path.chunk_attention, one_chunk):
        peaks = [
            peak_bytes(lambda n=n, form=form: attend(own, make_lanes_of(n), form, tile_slots=256, **options))
            for n in (1024, 4096)
        ]
        assert peaks[0] == peaks[1]


@cache
def make_lanes_of(length: int) -> Lanes:
    return make_lanes((length, length), block_size=32, dense_start=4096 - length)


PACKED = [Format.INT8, Format.INT4, Format.INT2]


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", LIMITS[::2])
def test_packed_formats_agree_with_the_reference(format: Format, dtype: torch.dtype, limits: dict[str, Any]) -> None:
    torch.manual_seed(11)
    q, k, v, positions = chunk(23, 2, 3, 64, 40, first=70)
    lanes = make_lanes((70, 37), key_dim=64, value_dim=40, format=format, block_size=32, end=70)
    check((q.to(dtype), k.to(dtype), v.to(dtype), positions), lanes, **limits)


@pytest.mark.parametrize("window", [None, 9])
def test_several_sequences_are_each_as_alone(window: int | None) -> None:
    """Of any lengths and formats, with any reach; what is computed is the same to the bit."""
    torch.manual_seed(12)
    counts, pasts, reaches = (5, 1, 130, 33), (45, 0, 70, 200), (None, (3, 7), None, (0, 40))
    q, k, v, _ = chunk(sum(counts) + 2, 2, 3, 32)
    chunks, start = [], 1
    for number, (count, past, reach) in enumerate(zip(counts, pasts, reaches, strict=True)):
        format = [Format.FP32, Format.FP32, Format.INT4, Format.BF16][number]
        lanes = make_lanes((past, past // 2), format=format, block_size=32, end=past)
        parts = [lanes.part] if past else []
        chunks.append(
            ChunkRows(start=start, count=count, positions=torch.arange(past, past + count), past=parts, reach=reach)
        )
        start += count
    out, lses = chunk_attention(q, k, v, chunks, scale=0.2, window=window)
    for each, lse in zip(chunks, lses, strict=True):
        rows = slice(each.start, each.start + each.count)
        alone_out, alone_lse = one_chunk(
            q[rows], k[rows], v[rows], each.positions, each.past, reach=each.reach, scale=0.2, window=window
        )
        torch.testing.assert_close(out[rows], alone_out, rtol=0, atol=0)
        torch.testing.assert_close(lse, alone_lse, rtol=0, atol=0)


def test_long_chunks_are_cut_into_items_without_a_trace() -> None:
    torch.manual_seed(13)
    check(chunk(700, 1, 2, 32, first=90), make_lanes((90,), block_size=32, end=90))
    check(chunk(300, 2, 4, 128, first=90), make_lanes((90, 40), key_dim=128, block_size=32, end=90), window=100)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 90),
    lengths=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    group=st.sampled_from([1, 2, 5, 8]),
    dims=st.tuples(st.sampled_from([1, 7, 16, 33, 64, 256]), st.sampled_from([1, 7, 16, 33, 64, 256])),
    limits=st.sampled_from(LIMITS),
)
def test_odd_sizes(
    tokens: int, lengths: tuple[int, int], group: int, dims: tuple[int, int], limits: dict[str, Any]
) -> None:
    torch.manual_seed(tokens)
    lanes = make_lanes(lengths, key_dim=dims[0], value_dim=dims[1], end=90)
    q, k, v, positions = chunk(tokens, 2, group, dims[0], dims[1], first=90)
    want = attend((q, k, v, positions), lanes, torch_path.chunk_attention, **limits)
    for form in NATIVE:
        for got, right in zip(attend((q, k, v, positions), lanes, form, **limits), want, strict=True):
            close(got, right, atol=3e-5)
