from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.unit.kernels.fast_forms import FAST_FORMS, Form, NativeForm, fast_form, running_forms
from tests.unit.kernels.lanes import Lanes, close, make_lanes, read

from kvatlas.core.errors import ConfigError
from kvatlas.core.streams import SideLayout, Stream
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.decode_attention import decode_attention, native, reference, torch_path
from kvatlas.kernels.pool import Credit, Entries, Part, SidePool
from kvatlas.kernels.visibility import slot_mask

FLOATS = [Format.FP32, Format.BF16, Format.FP16]
PACKED = [Format.INT4, Format.INT2]
FORMS = running_forms(torch_path, native, "decode_attention")


@pytest.fixture(params=FAST_FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    """A fast form of the operation."""
    return fast_form(request.param, torch_path, native, "decode_attention")


def case(R: int, H: int, G: int, lengths: list[int], *, dtype: torch.dtype = torch.float32, **lane: Any) -> Any:
    """Return queries, the parts of R sequences of H lanes (one part), and these lanes as a flat list."""
    torch.manual_seed(0)
    lanes = make_lanes(lengths, **lane)
    q = torch.randn(R, H * G, lanes.part.pool.layout.key_dim).to(dtype)
    return q, [batched(lanes, R)], lanes


def batched(lanes: Lanes, R: int) -> Part:
    table, length = lanes.table, lanes.length
    return replace(lanes.part, table=table.view(R, -1, table.shape[-1]), length=length.view(R, -1))


def answer(form: Form, q: torch.Tensor, parts: list[Part], **options: Any) -> Any:
    """Return output and mass of a form."""
    names = ("softcap", "sinks", "window", "query_position", "slots", "shared")
    plain = dict.fromkeys(names) | {"scale": q.shape[-1] ** -0.5, "need_mass": True}
    return form(q, parts, **plain | options)


def reference_of(q: torch.Tensor, parts: list[Part], **options: Any) -> Any:
    return answer(reference.decode_attention, q, parts, **options)


def agree(q: torch.Tensor, parts: list[Part], forms: Sequence[Form] = FORMS, **options: Any) -> None:
    """Compare forms with the reference: loosely where the torch form does not round as the reference does."""
    want_out, want_mass = reference_of(q, parts, **options)
    packed = any(part.pool.layout.format.is_packed for part in parts)
    for form in forms:
        out, mass = answer(form, q, parts, **options)
        assert out.dtype == q.dtype and all(each.dtype == torch.float32 for each in mass), form
        loose = 0.0
        if packed:
            loose = 0.03 if form is torch_path.decode_attention else 2e-3
        elif any(part.pool.layout.format is Format.INT8 for part in parts):
            loose = 5e-5  # queries and weights of 16 bits
        narrow = 1e-2 if q.dtype in (torch.bfloat16, torch.float16) else 0.0
        close(mass, want_mass, atol=max(2e-5, 4 * loose), rtol=max(2e-4, loose), form=form)
        close(out, want_out, atol=max(2e-5, narrow, 2 * loose), rtol=max(2e-4, narrow, loose), form=form)


@pytest.mark.parametrize("head_dim", [32, 60, 128])
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("lengths", [[24, 24, 24, 24], [23, 24, 17, 1], [0, 5, 0, 31], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_agrees_with_the_reference(head_dim: int, group: int, lengths: list[int]) -> None:
    q, parts, _ = case(2, 2, group, lengths, key_dim=head_dim)
    agree(q, parts)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9, 1000])
@pytest.mark.parametrize("value_dim", [32, 20])
def test_options_agree_with_the_reference(
    softcap: float | None, with_sinks: bool, window: int | None, value_dim: int
) -> None:
    q, parts, _ = case(3, 2, 4, [13, 0, 1, 24, 16, 7], value_dim=value_dim, end=40)
    position = torch.tensor([12, 40, 39]) if window else None
    sinks = torch.randn(8) if with_sinks else None
    agree(q, parts, softcap=softcap, sinks=sinks, window=window, query_position=position)


@pytest.mark.parametrize("window", [1, 9, 20, 1000])
@pytest.mark.parametrize("start", [0, 5])
def test_a_window_over_slots_in_order(form: Form, window: int, start: int) -> None:
    q, (part,), _ = case(2, 2, 3, [24, 17, 40, 1], dense_start=start)
    position = torch.tensor([start + 23, start + 39])
    options = {"window": window, "query_position": position}
    in_order = replace(part, dense_start=start)
    got = answer(form, q, [in_order], **options)
    close(got, reference_of(q, [in_order], **options))
    close(got, reference_of(q, [part], **options))


@pytest.mark.parametrize("format", FLOATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_float_formats_agree_with_the_reference(format: Format, dtype: torch.dtype) -> None:
    q, parts, _ = case(2, 2, 2, [13, 9, 1, 24], dtype=dtype, format=format)
    agree(q, parts, [form for form in FORMS if native.covers(q) or not isinstance(form, NativeForm)])


@pytest.mark.parametrize("head_dim", [8, 80, 96, 256])
@pytest.mark.parametrize("format", FLOATS)
def test_head_dims_of_all_kinds(head_dim: int, format: Format) -> None:
    q, parts, _ = case(1, 2, 5, [33, 70], key_dim=head_dim, value_dim=head_dim // 2 + 1, format=format, block_size=16)
    agree(q, parts)


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("block_size", [1, 4, 16, 32, 64])
def test_block_sizes_of_all_kinds(group: int, block_size: int) -> None:
    q, parts, _ = case(1, 3, group, [131, 64, 5], block_size=block_size, format=Format.FP16)
    agree(q, parts)


@pytest.mark.parametrize("format", [Format.INT8, *PACKED])
@pytest.mark.parametrize("head_dim", [32, 60, 128])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("window", [None, 20])
def test_encoded_formats_agree_with_the_reference(
    format: Format, head_dim: int, group: int, window: int | None
) -> None:
    q, parts, _ = case(2, 2, group, [70, 0, 1, 64], key_dim=head_dim, format=format, block_size=32, end=72)
    position = torch.tensor([71, 69]) if window else None
    agree(q, parts, window=window, query_position=position)


@pytest.mark.parametrize("format", [Format.FP16, Format.INT8, *PACKED])
def test_a_lane_of_two_parts(format: Format) -> None:
    q, first, _ = case(2, 2, 4, [64, 32, 0, 96], format=format, block_size=32, end=150, key_dim=64)
    second = batched(make_lanes([13, 0, 24, 1], block_size=8, end=150, key_dim=64), 2)
    options = {"sinks": torch.randn(8), "window": 100, "query_position": torch.tensor([140, 149])}
    agree(q, [*first, second], **options)
    agree(q, [second, *first])


@pytest.mark.parametrize("format", [*FLOATS, Format.INT8, *PACKED])
@pytest.mark.parametrize("window", [None, 60])
def test_chosen_slots(format: Format, window: int | None) -> None:
    lengths = [70, 40, 33, 128]
    q, (part,), _ = case(2, 2, 4, lengths, format=format, block_size=32, end=130)
    counts = torch.tensor([[45, 1], [0, 50]])
    slots = torch.full((2, 2, 50), 31, dtype=torch.int32)
    for lane, (n, count) in enumerate(zip(lengths, counts.flatten().tolist(), strict=True)):
        slots[lane // 2, lane % 2, :count] = torch.randperm(n)[: min(n, count)].int()
    position = torch.tensor([129, 120]) if window else None
    agree(q, [replace(part, length=counts)], slots=slots, window=window, query_position=position)


def test_lanes_of_very_different_lengths() -> None:
    """So that threads share the long one."""
    q, parts, _ = case(3, 2, 4, [1, 900, 3, 0, 40, 2000], block_size=32, format=Format.BF16)
    agree(q, parts, sinks=torch.randn(8))
    agree(q, parts, softcap=2.0, window=300, query_position=torch.tensor([1200, 7, 3000]))


def test_large_scores_do_not_overflow() -> None:
    q, parts, _ = case(1, 2, 4, [40, 7])
    agree(q * 300, parts)
    agree(q * 300, parts, softcap=30.0)


@pytest.mark.parametrize("buffer_bytes", [1, 3000, 9000])
def test_small_buffers_split_lanes_and_columns_without_a_trace(
    buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_path, "CPU_BUFFER_BYTES", buffer_bytes)
    q, parts, _ = case(2, 2, 3, [39, 40, 17, 0], end=50)
    forms = [torch_path.decode_attention]
    agree(q, parts, forms, sinks=torch.randn(6), window=20, query_position=torch.tensor([50, 45]))
    agree(q, parts, forms, softcap=2.0)


def test_reference_is_plain_attention_on_a_dense_case() -> None:
    q, parts, lanes = case(1, 2, 3, [21, 21])
    out, _ = reference_of(q, parts)
    k, v = (torch.stack([read(pool, lanes, h) for h in range(2)]) for pool in (lanes.k_pool, lanes.v_pool))
    want = torch.nn.functional.scaled_dot_product_attention(
        q.view(1, 6, 1, 32), k.unsqueeze(0), v.unsqueeze(0), enable_gqa=True
    )
    close(out, want.view(1, 6, 32))


@pytest.mark.parametrize("format", PACKED)
def test_rounding_in_the_reference_of_packed_formats_stays_small(format: Format) -> None:
    q, parts, _ = case(1, 2, 4, [96, 64], format=format, block_size=32, key_dim=64)
    rounded, plain = reference_of(q, parts)[0], answer(torch_path.decode_attention, q, parts)[0]
    assert (rounded - plain).norm() / plain.norm() < 0.02


@pytest.mark.parametrize("window", [None, 8])
def test_masks_are_built_once_for_layers_that_share_them(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, parts, _ = case(2, 2, 2, [13, 24, 1, 0], end=30)
    position = torch.tensor([28, 20]) if window else None
    built = []

    def counting(part: Part, **options: Any) -> Any:
        built.append(part)
        return slot_mask(part, **options)

    monkeypatch.setattr(torch_path, "slot_mask", counting)
    shared: dict[Any, Any] = {}
    options = {"window": window, "query_position": position}
    first = answer(torch_path.decode_attention, q, parts, shared=shared, **options)
    close(first, reference_of(q, parts, **options))
    close(answer(torch_path.decode_attention, q, parts, shared=shared, **options), first, atol=0, rtol=0)
    assert len(built) == 1


def test_no_mask_where_every_slot_is_visible() -> None:
    _, (part,), _ = case(2, 2, 1, [16, 16, 16, 16])
    assert slot_mask(part) is None


@pytest.mark.parametrize("format", [*FLOATS, Format.INT8])
def test_slots_without_a_token_are_hidden_even_if_they_hold_nan(form: Form, format: Format) -> None:
    q, (part,), lanes = case(1, 2, 2, [16, 13], format=format)
    for slot in (0, 3, 9):
        block = lanes.table[1, slot // 8]
        lanes.pos_pool[block, slot % 8] = -1
        if format is Format.INT8:
            part.pool.key_params[block, slot % 8] = part.pool.value_params[block, slot % 8] = torch.nan
        else:
            lanes.k_pool[block, slot % 8] = lanes.v_pool[block, slot % 8] = torch.nan
    parts = [replace(part, hide_empty=True)]
    agree(q, parts, [form])
    _, (mass,) = answer(form, q, parts)
    assert (mass[0, 1, [0, 3, 9]] == 0).all()


@pytest.mark.parametrize("format", PACKED)
def test_empty_slots_of_packed_blocks_are_hidden(format: Format) -> None:
    q, (part,), lanes = case(1, 2, 2, [64, 40], format=format, block_size=32)
    for slot in (0, 3, 33):
        block = lanes.table[1, slot // 32]
        lanes.pos_pool[block, slot % 32] = -1
        part.pool.value_params[block, :, :, slot % 32] = torch.nan
    agree(q, [replace(part, hide_empty=True)])


def test_a_block_of_which_nothing_is_visible() -> None:
    q, (part,), lanes = case(1, 2, 2, [24, 16])
    lanes.pos_pool[lanes.table.long()] = -1
    lanes.pos_pool[lanes.table[0, 1].long(), 4] = 7
    agree(q, [replace(part, hide_empty=True)])


def test_a_table_without_columns_gives_zeros(form: Form) -> None:
    q, (part,), _ = case(2, 2, 3, [0, 0, 0, 0])
    out, (mass,) = answer(form, q, [replace(part, table=part.table[..., :0])])
    assert out.shape == (2, 6, 32) and (out == 0).all()
    assert mass.shape == (2, 2, 0)


def test_unused_table_entries_do_not_matter(form: Form) -> None:
    q, (part,), lanes = case(1, 3, 2, [16, 3, 0])
    before = answer(form, q, [part])
    part.table[0, 1, 1] = part.table[0, 2, 0] = lanes.table[0, 0]
    close(answer(form, q, [part]), before, atol=0, rtol=0)


def test_strided_arguments(form: Form) -> None:
    """Queries out of a packed projection; a table trimmed to the columns in use; lengths of every other layer."""
    q, (part,), _ = case(2, 2, 3, [13, 9, 1, 24])
    wide_q = torch.cat([torch.full_like(q, torch.nan), q], dim=1)[:, 6:]
    wide_table = torch.cat([part.table, torch.full_like(part.table, 1 << 30)], dim=-1)[..., : part.table.shape[-1]]
    wide_length = part.length.repeat_interleave(2, dim=1)[:, ::2]
    got = answer(form, wide_q, [replace(part, table=wide_table, length=wide_length)])
    close(got, reference_of(q, [part]))


def test_a_window_needs_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    q, (part,), _ = case(1, 2, 2, [16, 3])
    layout = replace(part.pool.layout, positions=False)
    bare = replace(part, pool=replace(part.pool, layout=layout))
    for choice in ("auto", "reference"):
        monkeypatch.setenv("KVATLAS_KERNELS", choice)
        with pytest.raises(ConfigError, match="query_position"):
            decode_attention(q, [part], scale=1.0, window=4)
        with pytest.raises(ConfigError, match="dense_start"):
            decode_attention(q, [bare], scale=1.0, window=4, query_position=torch.tensor([20]))


def test_slots_are_those_of_one_part() -> None:
    q, (part,), _ = case(1, 2, 2, [16, 3])
    slots = torch.zeros(1, 2, 3, dtype=torch.int32)
    with pytest.raises(ConfigError, match="got 2 parts"):
        decode_attention(q, [part, part], scale=1.0, slots=slots)
    with pytest.raises(ConfigError, match="got 0 parts"):
        decode_attention(q, [], scale=1.0)


def test_the_environment_chooses_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    q, parts, _ = case(1, 2, 2, [16, 3])
    monkeypatch.setenv("KVATLAS_KERNELS", "reference")
    monkeypatch.setattr(reference, "decode_attention", lambda *_, **__: ("the reference", None))
    assert decode_attention(q, parts, scale=1.0) == ("the reference", None)
    monkeypatch.setenv("KVATLAS_KERNELS", "fastest")
    with pytest.raises(ConfigError, match=r"fastest.*auto, reference"):
        decode_attention(q, parts, scale=1.0)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    group=st.integers(1, 5),
    block_size=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_mass_sums_to_the_group_and_order_of_slots_does_not_matter(
    lengths: list[int], group: int, block_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    lanes = make_lanes(lengths, block_size=block_size)
    q = torch.randn(1, 2 * group, 32)
    out, mass = attend(q, lanes)
    close(mass.sum(-1)[0], torch.tensor([group if n else 0 for n in lengths]).float())
    orders = [torch.randperm(n) for n in lengths]
    for h, order in enumerate(orders):
        slots = [(lanes.table[h, i // block_size], i % block_size) for i in range(len(order))]
        for pool in (lanes.k_pool, lanes.v_pool):
            rows = [pool[slots[i]].clone() for i in order.tolist()]
            for slot, row in zip(slots, rows, strict=True):
                pool[slot] = row
    shuffled_out, shuffled_mass = attend(q, lanes)
    close(shuffled_out, out)
    for h, order in enumerate(orders):
        close(shuffled_mass[0, h, : len(order)], mass[0, h][order])


def attend(q: torch.Tensor, lanes: Lanes) -> tuple[torch.Tensor, torch.Tensor]:
    out, mass = decode_attention(q, [batched(lanes, 1)], scale=0.2, need_mass=True)
    assert mass is not None
    return out, mass[0]


def credit_of(parts: list[Part], factor: float = 1.0) -> Credit:
    """Return streams beside the slots of some parts, which have received something before."""
    entries = []
    for part in parts:
        size, (R, H, C) = part.pool.layout.block_size, part.table.shape
        layout = SideLayout((Stream(name="other", width=3), Stream(name="received", fill=0.0)), size)
        step = layout.block_bytes // 64
        memory = torch.zeros((R * H * C + 1) * layout.block_bytes, dtype=torch.uint8)
        table = (torch.randperm(R * H * C) * step).view(R, H, C).int()
        table[part.table == part.table[0, 0, -1]] = table.max()  # ids left over from other times
        pool = SidePool(memory=memory, layout=layout)
        pool.view("received")[::step] = torch.rand(len(pool.view("received")[::step]), size, 1)
        entries.append(Entries(pool=pool, name="received", table=table, length=part.length))
    return Credit(entries=entries, factor=factor)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"sinks": True, "softcap": 3.0}])
@pytest.mark.parametrize("format", [Format.FP32, Format.FP16, Format.INT8, Format.INT4])
def test_mass_may_be_added_where_it_belongs(format: Format, options: dict[str, Any]) -> None:
    """To what slots have received; that of other slots, and other streams, stays as it is."""
    q, parts, _ = case(3, 2, 4, [33, 0, 1, 96, 64, 70], format=format, block_size=32, end=120, hide_empty=True)
    if options.get("window"):
        options = options | {"query_position": torch.tensor([60, 100, 119])}
    if options.get("sinks"):
        options = options | {"sinks": torch.randn(8)}
    for form in FORMS:
        credit = credit_of(parts, factor=0.5)
        step = credit.entries[0].pool.layout.block_bytes // 64  # rows between overlap
        before = credit.entries[0].pool.view("received")[::step].clone()
        out, masses = answer(form, q, parts, **options)
        for each, mass in zip(credit.entries, masses, strict=True):
            wanted = each.pool.view("received").clone()  # row by row
            for r, h in product(range(3), range(2)):
                for column in range(-(-int(each.length[r, h]) // 32)):
                    wanted[each.table[r, h, column], :, 0] += 0.5 * mass[r, h, column * 32 : column * 32 + 32]
            if form is torch_path.decode_attention:
                credit.add(masses)
            else:
                again, none = answer(form, q, parts, **options, credit=credit, need_mass=False)
                assert none is None
                torch.testing.assert_close(again, out, rtol=0, atol=0)
            torch.testing.assert_close(each.pool.view("received")[::step], wanted[::step], rtol=1e-5, atol=1e-6)
        assert not torch.equal(before, credit.entries[0].pool.view("received")[::step])
