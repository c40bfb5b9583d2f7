from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.unit.kernels.lanes import Lanes, close, dense, make_lanes, peak_bytes
from tests.unit.kernels.test_chunk_attention import LIMITS, chunk, make_lanes_of, split, stored

from kvatlas.core.vocabulary import Format
from kvatlas.kernels import tiles
from kvatlas.kernels.chunk_attention import chunk_attention
from kvatlas.kernels.column_sums import column_sums, reference


def sums(
    own: tuple[torch.Tensor, ...], lanes: Lanes, *, form: Any = column_sums, sinks: Any = None, **options: Any
) -> Any:
    q, k, _, positions = own
    lanes = dense(lanes, options.pop("dense_start", None))
    options = {"scale": q.shape[-1] ** -0.5, "tile_slots": 16} | options
    _, lse = chunk_attention(*own, [lanes.part], sinks=sinks, **options)
    if form is reference.column_sums:
        options = {"softcap": None, "window": None, "reach": None} | options
    (past,), sums_own = form(q, k, positions, lse, [lanes.part], **options)
    return past, sums_own


def check(own: tuple[torch.Tensor, ...], lanes: Lanes, **options: Any) -> None:
    past, sum_own = sums(own, lanes, **options)
    assert past.dtype == sum_own.dtype == torch.float32
    loose = 5e-3 if own[0].dtype in (torch.bfloat16, torch.float16) else 5e-5
    close((past, sum_own), sums(own, lanes, form=reference.column_sums, **options), atol=loose, rtol=loose)


@pytest.mark.parametrize("tokens", [1, 7, 63])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 32), (3, 60), (16, 128)])
@pytest.mark.parametrize("lengths", [(45, 45), (45, 16), (0, 33), (1, 1), (0, 0)])
def test_agrees_with_the_reference(tokens: int, group: int, head_dim: int, lengths: tuple[int, int]) -> None:
    torch.manual_seed(tokens + group)
    check(chunk(tokens, 2, group, head_dim, first=60), make_lanes(lengths, key_dim=head_dim, end=60))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("lengths", "dense_start"), [((45, 16), None), ((45, 45), 0)])
def test_options_agree_with_the_reference(
    limits: dict[str, Any],
    softcap: float | None,
    with_sinks: bool,
    lengths: tuple[int, int],
    dense_start: int | None,
) -> None:
    torch.manual_seed(1)
    lanes = make_lanes(lengths, value_dim=20, dense_start=dense_start, end=45)
    sinks = torch.randn(6) if with_sinks else None
    own = chunk(19, 2, 3, 32, 20, first=45)
    check(own, lanes, softcap=softcap, sinks=sinks, dense_start=dense_start, **limits)


@pytest.mark.parametrize("format", [Format.BF16, Format.FP16, Format.FP32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_formats_agree_with_the_reference(format: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    q, k, v, positions = chunk(9, 2, 2, 32, first=30)
    lanes = make_lanes((30, 17), format=format, end=30)
    check((q.to(dtype), k.to(dtype), v.to(dtype), positions), lanes)


@pytest.mark.parametrize("limits", LIMITS)
def test_small_steps_split_queries_without_a_trace(limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "STEP_BYTES", 1000)
    torch.manual_seed(3)
    check(chunk(37, 2, 3, 32, first=45), make_lanes((45, 45), end=45), **limits)


def test_a_slot_without_a_token_has_no_sum_even_if_it_holds_nan() -> None:
    torch.manual_seed(4)
    lanes = make_lanes((20, 13), end=20)
    block = lanes.table[0, 1]
    lanes.pos_pool[block, 2] = -1
    lanes.k_pool[block, 2] = lanes.v_pool[block, 2] = torch.nan
    own = chunk(5, 2, 2, 32, first=20)
    check(own, lanes)
    past, _ = sums(own, lanes)
    assert past[0, 10] == 0 and (past[1, 13:] == 0).all()


def test_queries_that_see_nothing_add_nothing() -> None:
    past, own = sums(chunk(3, 1, 2, 32, first=10), make_lanes((8,), dense_start=0), window=0)
    assert (past == 0).all() and (own == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 40),
    cut=st.integers(1, 39),
    tile_slots=st.sampled_from([1, 8, 24]),
    limits=st.sampled_from(LIMITS),
    dense=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
)
def test_sums_of_chunks_add_up_to_the_whole(
    tokens: int, cut: int, tile_slots: int, limits: dict[str, Any], dense: bool, softcap: float | None
) -> None:
    cut = min(cut, tokens - 1)
    torch.manual_seed(tokens * 40 + cut)
    own = chunk(tokens, 2, 3, 32)
    options = limits | {"tile_slots": tile_slots, "softcap": softcap}
    _, whole = sums(own, make_lanes((0, 0)), **options)
    close(whole.sum(dim=1), torch.full((2,), 3.0 * tokens))
    head, tail = split(own, cut)
    _, first = sums(head, make_lanes((0, 0)), **options)
    past, second = sums(tail, stored(head), dense_start=0 if dense else None, **options)
    close(torch.cat([first + past[:, :cut], second], dim=1), whole)
    assert (past[:, cut:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 700}])
def test_memory_does_not_grow_with_the_past(options: dict[str, Any]) -> None:
    q, k, _, positions = chunk(64, 2, 2, 32, first=4096)
    lse = torch.zeros(4, 64)
    peaks = []
    for length in (1024, 4096):
        lanes = make_lanes_of(length)
        peak = peak_bytes(
            lambda lanes=lanes: column_sums(q, k, positions, lse, [lanes.part], scale=0.2, tile_slots=256, **options)
        )
        peaks.append(peak - 4 * 2 * length)  # the result itself is one number per slot
    assert peaks[0] == peaks[1]
