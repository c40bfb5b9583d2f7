from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.unit.kernels.lanes import Lanes, close, make_lanes, read

from kvatlas.core.errors import ConfigError
from kvatlas.kernels.decode_attention import decode_attention, reference, slot_mask, torch_path


def case(
    R: int, H: int, G: int, lengths: list[int], *, dtype: torch.dtype = torch.float32, **lane: Any
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    lanes = make_lanes(lengths, dtype=lane.pop("pool_dtype", dtype), **lane)
    q = torch.randn(R, H * G, lanes.k_pool.shape[-1]).to(dtype)
    C = lanes.table.shape[1]
    return q, lanes.k_pool, lanes.v_pool, lanes.table.view(R, H, C), lanes.length.view(R, H), lanes


def both(q: Any, k: Any, v: Any, table: Any, length: Any, **options: Any) -> tuple[Any, Any]:
    options = {
        "scale": q.shape[-1] ** -0.5,
        "softcap": None,
        "sinks": None,
        "window": None,
        "pos_pool": None,
        "query_position": None,
        "mask": None,
        "need_mass": True,
    } | options
    want = reference.decode_attention(q, k, v, table, length, **options)
    return torch_path.decode_attention(q, k, v, table, length, **options), want


@pytest.mark.parametrize("head_dim", [32, 60, 128])
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("lengths", [[24, 24, 24, 24], [23, 24, 17, 1], [0, 5, 0, 31], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_agrees_with_the_reference(head_dim: int, group: int, lengths: list[int]) -> None:
    got, want = both(*case(2, 2, group, lengths, key_dim=head_dim)[:5])
    close(got, want)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9, 1000])
@pytest.mark.parametrize("value_dim", [32, 20])
def test_options_agree_with_the_reference(
    softcap: float | None, with_sinks: bool, window: int | None, value_dim: int
) -> None:
    *args, lanes = case(3, 2, 4, [13, 0, 1, 24, 16, 7], value_dim=value_dim, end=40)
    position = torch.tensor([12, 40, 39])
    options = {"pos_pool": lanes.pos_pool, "query_position": position} if window else {}
    got, want = both(*args, softcap=softcap, sinks=torch.randn(8) if with_sinks else None, window=window, **options)
    close(got, want)


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_formats_agree_with_the_reference(pool_dtype: torch.dtype, dtype: torch.dtype) -> None:
    args = case(2, 2, 2, [13, 9, 1, 24], dtype=dtype, pool_dtype=pool_dtype)[:5]
    (out, mass), (want_out, want_mass) = both(*args)
    assert out.dtype == dtype and mass.dtype == torch.float32
    close(mass, want_mass)
    loose = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-5
    close(out, want_out, atol=loose, rtol=loose)


@pytest.mark.parametrize("buffer_bytes", [1, 3000, 9000])
def test_small_buffers_split_lanes_and_columns_without_a_trace(
    buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_path, "CPU_BUFFER_BYTES", buffer_bytes)
    *args, lanes = case(2, 2, 3, [39, 40, 17, 0], end=50)
    got, want = both(
        *args, sinks=torch.randn(6), window=20, pos_pool=lanes.pos_pool, query_position=torch.tensor([50, 45])
    )
    close(got, want)
    got, want = both(*args, softcap=2.0)
    close(got, want)


def test_reference_is_plain_attention_on_a_dense_case() -> None:
    *args, lanes = case(1, 2, 3, [21, 21])
    out, _ = both(*args)[1]
    k, v = (torch.stack([read(pool, lanes, h) for h in range(2)]) for pool in (lanes.k_pool, lanes.v_pool))
    want = torch.nn.functional.scaled_dot_product_attention(
        args[0].view(1, 6, 1, 32), k.unsqueeze(0), v.unsqueeze(0), enable_gqa=True
    )
    close(out, want.view(1, 6, 32))


@pytest.mark.parametrize("window", [None, 8])
def test_a_mask_built_once_gives_the_same(window: int | None) -> None:
    *args, lanes = case(2, 2, 2, [13, 24, 1, 0], end=30)
    options: dict[str, Any] = {"scale": 0.2, "need_mass": True}
    if window:
        options |= {"window": window, "pos_pool": lanes.pos_pool, "query_position": torch.tensor([28, 20])}
    mask = slot_mask(
        args[4],
        args[3].shape[-1],
        8,
        window=window,
        pos_pool=options.get("pos_pool"),
        table=args[3],
        query_position=options.get("query_position"),
    )
    assert mask is not None and mask.dtype == torch.float32
    close(decode_attention(*args, mask=mask, **options), decode_attention(*args, **options), atol=0, rtol=0)
    assert (
        reference.decode_attention(
            *args,
            softcap=None,
            sinks=None,
            **(options | {"mask": mask} | dict.fromkeys(("window", "pos_pool", "query_position"))),
        )[0]
        .isfinite()
        .all()
    )


def test_no_mask_where_every_slot_is_visible() -> None:
    assert slot_mask(torch.full((2, 3), 16), 2, 8) is None


def test_slots_without_a_token_are_hidden_even_if_they_hold_nan() -> None:
    *args, lanes = case(1, 2, 2, [16, 13])
    for slot in (0, 3, 9):
        block = lanes.table[1, slot // 8]
        lanes.pos_pool[block, slot % 8] = -1
        lanes.k_pool[block, slot % 8] = torch.nan
        lanes.v_pool[block, slot % 8] = torch.nan
    got, want = both(*args, pos_pool=lanes.pos_pool)
    close(got, want)
    assert (got[1][0, 1, [0, 3, 9]] == 0).all()


def test_a_table_without_columns_gives_zeros() -> None:
    q, k, v, table, length, _ = case(2, 2, 3, [0, 0, 0, 0])
    out, mass = decode_attention(q, k, v, table[..., :0], length, scale=1.0, need_mass=True)
    assert out.shape == (2, 6, 32) and (out == 0).all()
    assert mass is not None and mass.shape == (2, 2, 0)


def test_unused_table_entries_do_not_matter() -> None:
    *args, lanes = case(1, 3, 2, [16, 3, 0])
    before = decode_attention(*args, scale=0.2, need_mass=True)
    args[3][0, 1, 1] = args[3][0, 2, 0] = lanes.table[0, 0]
    close(decode_attention(*args, scale=0.2, need_mass=True), before, atol=0, rtol=0)


def test_a_window_needs_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    *args, lanes = case(1, 2, 2, [16, 3])
    for choice in ("auto", "reference"):
        monkeypatch.setenv("KVATLAS_KERNELS", choice)
        with pytest.raises(ConfigError, match="positions"):
            decode_attention(*args, scale=1.0, window=4)
        with pytest.raises(ConfigError, match="query_position"):
            decode_attention(*args, scale=1.0, window=4, pos_pool=lanes.pos_pool)
    with pytest.raises(ConfigError, match="table"):
        slot_mask(args[4], 2, 8, pos_pool=lanes.pos_pool)


def test_the_environment_chooses_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    *args, _ = case(1, 2, 2, [16, 3])
    monkeypatch.setenv("KVATLAS_KERNELS", "reference")
    monkeypatch.setattr(reference, "decode_attention", lambda *_, **__: "the reference")
    assert decode_attention(*args, scale=1.0) == "the reference"
    monkeypatch.setenv("KVATLAS_KERNELS", "fastest")
    with pytest.raises(ConfigError, match=r"fastest.*auto, reference"):
        decode_attention(*args, scale=1.0)


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
    out, mass = decode_attention(
        q, lanes.k_pool, lanes.v_pool, lanes.table[None], lanes.length[None], scale=0.2, need_mass=True
    )
    assert mass is not None
    return out, mass
