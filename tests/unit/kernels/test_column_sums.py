from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.unit.kernels.fast_forms import FAST_FORMS, Form, NativeForm, fast_form, running_forms
from tests.unit.kernels.lanes import Lanes, close, dense, make_lanes, peak_bytes
from tests.unit.kernels.test_chunk_attention import LIMITS, chunk, make_lanes_of, one_chunk, split, stored

from kvatlas.core.vocabulary import Format
from kvatlas.kernels import tiles
from kvatlas.kernels.column_sums import column_sums, native, reference, torch_path
from kvatlas.kernels.native import Missing, library

FLOATS = [Format.FP32, Format.BF16, Format.FP16]
FORMS = running_forms(torch_path, native, "column_sums")
NO_LIMITS: dict[str, Any] = {"softcap": None, "window": None, "reach": None}


@pytest.fixture(params=FAST_FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    """A fast form of the operation."""
    return fast_form(request.param, torch_path, native, "column_sums")


def sums(form: Form, own: tuple[torch.Tensor, ...], *lanes: Lanes, sinks: Any = None, **options: Any) -> Any:
    """Return the sums of each part, then those of the chunk."""
    q, k, _, positions = own
    start = options.pop("dense_start", None)
    past = [dense(each, start).part for each in lanes]
    options = {"scale": q.shape[-1] ** -0.5, "tile_slots": 16} | NO_LIMITS | options
    together = {name: options.pop(name) for name in ("over", "heads") if name in options}
    _, lse = one_chunk(*own, past, sinks=sinks, **options)
    past_sums, own_sums = form(q, k, positions, lse, past, **options, **together)
    return [*past_sums, own_sums]


def check(own: tuple[torch.Tensor, ...], *lanes: Lanes, forms: Sequence[Form] = FORMS, **options: Any) -> None:
    """Compare forms with the reference, which is asked once."""
    loose = 5e-3 if own[0].dtype in (torch.bfloat16, torch.float16) else 5e-5
    wanted = sums(reference.column_sums, own, *lanes, **options)
    for form in forms:
        got = sums(form, own, *lanes, **options)
        assert all(each.dtype == torch.float32 for each in got), form
        close(got, wanted, atol=loose, rtol=loose, form=form)


WAYS = [*product(("sum", "max"), ("sum", "max", "mean")), ("below_mean", "max"), ("below_mean", "mean")]


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


@pytest.mark.parametrize(("over", "heads"), WAYS)
def test_queries_and_heads_may_be_put_together_otherwise(over: str, heads: str) -> None:
    torch.manual_seed(1)
    for limits in ({}, {"window": 9, "softcap": 3.0}):
        check(
            chunk(19, 2, 3, 32, first=45), make_lanes((45, 16), end=45), forms=[torch_path.column_sums, column_sums],
            over=over, heads=heads, **limits,
        )  # fmt: skip


@pytest.mark.parametrize("format", FLOATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_formats_agree_with_the_reference(format: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    q, k, v, positions = chunk(9, 2, 2, 32, first=30)
    lanes = make_lanes((30, 17), format=format, end=30)
    own = q.to(dtype), k.to(dtype), v.to(dtype), positions
    check(own, lanes, forms=[form for form in FORMS if native.covers(own[0]) or not isinstance(form, NativeForm)])


@pytest.mark.parametrize("limits", LIMITS)
def test_small_steps_split_queries_without_a_trace(limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "STEP_BYTES", 1000)
    torch.manual_seed(3)
    own, lanes = chunk(37, 2, 3, 32, first=45), make_lanes((45, 45), end=45)
    check(own, lanes, forms=[torch_path.column_sums], **limits)


def test_a_slot_without_a_token_has_no_sum_even_if_it_holds_nan(form: Form) -> None:
    torch.manual_seed(4)
    lanes = make_lanes((20, 13), end=20)
    block = lanes.table[0, 1]
    lanes.pos_pool[block, 2] = -1
    lanes.k_pool[block, 2] = lanes.v_pool[block, 2] = torch.nan
    own = chunk(5, 2, 2, 32, first=20)
    check(own, lanes, forms=[form])
    past, _ = sums(form, own, lanes)
    assert past[0, 10] == 0 and (past[1, 13:] == 0).all()


def test_queries_that_see_nothing_add_nothing(form: Form) -> None:
    past, own = sums(form, chunk(3, 1, 2, 32, first=10), make_lanes((8,), dense_start=0), window=0)
    assert (past == 0).all() and (own == 0).all()


@pytest.mark.parametrize("head_dim", [8, 33, 80, 256])
@pytest.mark.parametrize("format", FLOATS)
def test_head_dims_of_all_kinds(head_dim: int, format: Format) -> None:
    torch.manual_seed(5)
    lanes = make_lanes((33, 70), key_dim=head_dim, format=format, block_size=16, end=70)
    check(chunk(11, 2, 5, head_dim, first=70), lanes)


@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("block_size", [1, 4, 16, 32, 64, 100])
def test_block_sizes_of_all_kinds(group: int, block_size: int) -> None:
    torch.manual_seed(6)
    lanes = make_lanes((131, 64, 5), block_size=block_size, format=Format.FP16, end=131)
    check(chunk(13, 3, group, 32, first=131), lanes, window=70)


@pytest.mark.parametrize("format", [Format.INT8, Format.INT4, Format.INT2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 60, 128])
@pytest.mark.parametrize("limits", [{}, {"window": 30}])
def test_encoded_formats_agree_with_the_reference(
    format: Format, dtype: torch.dtype, head_dim: int, limits: dict[str, Any]
) -> None:
    torch.manual_seed(7)
    q, k, v, positions = chunk(9, 2, 2, head_dim, first=72)
    lanes = make_lanes((70, 33), key_dim=head_dim, format=format, block_size=32, end=72)
    check((q.to(dtype), k.to(dtype), v.to(dtype), positions), lanes, **limits)


@pytest.mark.parametrize("format", [Format.FP16, Format.INT8, Format.INT4])
def test_a_lane_of_two_parts(format: Format) -> None:
    torch.manual_seed(8)
    first = make_lanes((64, 0, 33), format=format, block_size=32, end=150, hide_empty=True)
    first.pos_pool[first.table[0, 1], :20] = -1
    second = make_lanes((13, 24, 1), block_size=8, end=150)
    check(chunk(7, 3, 4, 32, first=150), first, second, window=100)


@pytest.mark.parametrize("head_dim", [32, 256])
@pytest.mark.parametrize("limits", [{}, {"window": 300}, {"reach": (40, 200)}])
@pytest.mark.parametrize("in_order", [False, True])
def test_more_queries_and_keys_than_are_held_at_once(head_dim: int, limits: dict[str, Any], in_order: bool) -> None:
    torch.manual_seed(9)
    start = 0 if in_order else None
    lengths = (1100, 1100) if in_order else (1100, 650)
    lanes = make_lanes(lengths, key_dim=head_dim, block_size=32, dense_start=start, end=1100)
    check(chunk(110, 2, 2, head_dim, first=1100), lanes, dense_start=start, **limits)


def test_chunks_whose_positions_are_in_no_order() -> None:
    torch.manual_seed(10)
    q, k, v, positions = chunk(70, 2, 3, 32, first=45)
    check((q, k, v, positions[torch.randperm(70)]), make_lanes((45, 16), end=45), window=60)


def test_columns_behind_the_length_have_no_sums(form: Form) -> None:
    torch.manual_seed(11)
    own, lanes = chunk(9, 2, 3, 32, first=45), make_lanes((45, 0), end=45, columns=9)
    check(own, lanes, forms=[form])
    past, _ = sums(form, own, lanes)
    assert past.shape == (2, 72) and (past[0, 45:] == 0).all() and (past[1] == 0).all()


def test_queries_and_keys_may_be_views(form: Form) -> None:
    torch.manual_seed(12)
    q, k, v, positions = chunk(19, 2, 3, 32, first=45)
    wide = torch.full((2, 19, 64), torch.nan)
    wide[..., :32] = k.transpose(0, 1)
    views = q.transpose(0, 1).contiguous().transpose(0, 1), wide[..., :32].transpose(0, 1), v, positions
    lanes = make_lanes((45, 16), end=45)
    close(sums(form, views, lanes), sums(form, (q, k, v, positions), lanes))


def test_large_scores_do_not_overflow(form: Form) -> None:
    torch.manual_seed(13)
    q, k, v, positions = chunk(19, 2, 3, 32, first=45)
    lanes = make_lanes((45, 16), end=45)
    past, own = sums(form, (q * 300, k, v, positions), lanes)
    close(past.sum(dim=1) + own.sum(dim=1), torch.full((2,), 3.0 * 19), atol=1e-2)


@pytest.mark.parametrize("limits", [{}, {"window": 500}])
def test_the_number_of_threads_changes_no_bit(limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(library(), Missing):
        pytest.skip("no native kernels")
    torch.manual_seed(14)
    own, lanes = chunk(300, 2, 4, 64, first=700), make_lanes((700, 333), key_dim=64, end=700)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(native, "num_threads", lambda threads=threads: threads)
        found.append(sums(native.column_sums, own, lanes, **limits))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 32), (torch.float32, 264)])
def test_what_the_native_form_does_not_cover_goes_to_torch(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(15)
    q, k, v, positions = chunk(9, 2, 2, head_dim, first=30)
    own = q.to(dtype), k.to(dtype), v.to(dtype), positions
    assert not native.covers(own[0])
    check(own, make_lanes((30, 17), key_dim=head_dim, end=30), forms=[column_sums])


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
    _, whole = sums(column_sums, own, make_lanes((0, 0)), **options)
    close(whole.sum(dim=1), torch.full((2,), 3.0 * tokens))
    head, tail = split(own, cut)
    _, first = sums(column_sums, head, make_lanes((0, 0)), **options)
    past, second = sums(column_sums, tail, stored(head), dense_start=0 if dense else None, **options)
    close(torch.cat([first + past[:, :cut], second], dim=1), whole)
    assert (past[:, cut:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 700}])
def test_memory_does_not_grow_with_the_past(form: Form, options: dict[str, Any]) -> None:
    options = NO_LIMITS | options
    q, k, _, positions = chunk(64, 2, 2, 32, first=4096)
    lse = torch.zeros(4, 64)
    peaks = []
    for length in (1024, 4096):
        lanes = make_lanes_of(length)
        peak = peak_bytes(
            lambda lanes=lanes: form(q, k, positions, lse, [lanes.part], scale=0.2, tile_slots=256, **options)
        )
        peaks.append(peak - 4 * 2 * length)  # the result itself is one number per slot
    assert peaks[0] == peaks[1]
