"""Sequences whose old blocks are packed, against a plain Python model, under random schedules.

The model of a lane is a set of positions. The number that a token's key and value are made of is its position, so that
a slot with the right position and somebody else's bytes is found as far as codes can tell.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.driving import kept_positions
from tests.invariants.test_storage import MIXED, NUMBER, RANGE, SUMS, WINDOW_LANES, Maker, shown

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.core.layout import GROUP
from kvatlas.core.plan import uniform_cache
from kvatlas.core.shapes import ModelShape
from kvatlas.core.streams import Stream
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import read_keys, read_values
from kvatlas.storage.eviction import close_holes, cut, lane_slots, open_holes
from kvatlas.storage.lanes import KVGroup
from kvatlas.storage.link import Link
from kvatlas.storage.sequence import Sequence, Slots
from kvatlas.storage.store import KVStore
from kvatlas.storage.streams import derive_run, derive_tokens
from kvatlas.storage.swap import Swapper
from kvatlas.strategies.strategy import Strategy

LANES = [lane for lane in range(4) if lane not in WINDOW_LANES]
SPAN = 400
PAGES = (Stream(name="pages", width=2, every=8), Maker())


def write(store: KVStore, seq: Sequence, slots: Slots, first: int) -> None:
    """Give each new token a key and value made of its position, and a sum that is its position too."""
    for group in seq.layout.groups:
        block, offset = slots.block[:, group.lanes], slots.offset[:, group.lanes]
        number = torch.arange(first, first + len(block), dtype=torch.float32)[:, None, None]
        group.blocks.pool.keys[block, offset] = (number / SPAN).to(group.blocks.pool.keys.dtype)
        group.blocks.pool.values[block, offset] = (-number / SPAN).to(group.blocks.pool.values.dtype)
        assert group.side is not None and slots.side is not None
        group.side.pool.view("received")[slots.side[:, group.lanes], offset] = number
        keys = group.blocks.pool.keys[block, offset].float()
        table = store.table[seq.side.row, group.lanes]
        if len(block) > 1:
            derive_run(group.side, group.derived, table, slots.index[0, group.lanes], shown(keys.transpose(0, 1)))
        else:
            index = slots.index[:, group.lanes]
            fresh = index == store.length[seq.row, group.lanes] - 1
            place = slots.side[:, group.lanes], offset
            derive_tokens(group.side, group.derived, *place, fresh, shown(keys[:, :, None]))


def check_contents(store: KVStore, seq: Sequence, tolerance: float) -> None:
    for group in seq.layout.groups:
        slots = lane_slots(store, [seq], group)
        live, positions = slots.live[0], slots.positions[0]
        parts = [(seq.encoded, group.old), (seq, group.blocks)]
        keys, values = [], []
        for row, blocks in parts:
            if row is not None and blocks is not None:
                columns = -(-int(store.length[row.row, group.lanes].max()) // store.block_size)
                table = store.table[row.row, group.lanes, :columns]
                keys.append(read_keys(blocks.pool, table, torch.float32))
                values.append(read_values(blocks.pool, table, torch.float32))
        k, v = torch.cat(keys, dim=1)[live], torch.cat(values, dim=1)[live]
        number = positions[live].float()[:, None] / SPAN
        assert ((k - number).abs() <= tolerance).all() and ((v + number).abs() <= 2e-3).all()
        assert torch.equal(slots.read("keys")[0][live], k) and torch.equal(slots.read("values")[0][live], v)
        assert (slots.side("received")[0][live][:, 0] == positions[live]).all()
        stored = (positions[live].float() / SPAN).half()
        assert (slots.side("number")[0][live][:, 0] == stored).all()
        check_ranges(store, seq, group, keys)


def check_ranges(store: KVStore, seq: Sequence, group: KVGroup, keys: list[torch.Tensor]) -> None:
    """What is said of tokens together holds of each, as they were written or as they are read."""
    for row, blocks, read in zip(seq.parts, (group.old, group.blocks), keys, strict=False) if group.old else ():
        columns = read.shape[1] // store.block_size
        table, beside = (store.table[each.row, group.lanes, :columns] for each in row.with_side)
        number = blocks.positions[table.long()].float() / SPAN
        slot = torch.arange(columns * store.block_size).view(columns, store.block_size)
        length, hole = store.length[row.row, group.lanes], store.hole[row.row, group.lanes]
        live = (slot < length[:, None, None]) & (slot != hole[:, None, None]) & (number >= 0)
        for name in ("range", "pages"):
            said = group.side.pool.view(name)[beside.long()]
            low, high = said.repeat_interleave(group.side.layout.every(name), dim=2).unbind(-1)
            written, now = (
                (each >= low - 1e-3) & (each <= high + 1e-3) for each in (number, read[..., 0].reshape(number.shape))
            )
            assert (written | now)[live].all()


def check_blocks(store: KVStore, seq: Sequence) -> None:
    """All encoded blocks of a lane but one are more than half full; at most a block more than the window waits."""
    assert seq.encoded is not None
    for group in seq.encoded.layout.groups:
        for lane in group.lanes.tolist():
            columns = int(store.length[seq.encoded.row, lane]) // GROUP
            full = (group.blocks.positions[store.table[seq.encoded.row, lane, :columns].long()] >= 0).sum(dim=1)
            assert (full > 0).all() and int((full <= GROUP // 2).sum()) <= 1
    store.arena.check()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), residual=st.sampled_from([0, 5, 40]), packed=st.sampled_from([Format.INT4, Format.INT2]))
def test_random_schedules(data: st.DataObject, residual: int, packed: Format) -> None:
    store = KVStore(MIXED, Format.FP32, 1 << 20, block_size=GROUP, host_bytes=1 << 20)
    store.arena._memory.view(torch.float32).fill_(torch.nan)
    swapper = Swapper(store, Link())
    seq = store.open(
        store.layout(
            uniform_cache(
                MIXED, Format.FP16, GROUP, (SUMS,), derived=(NUMBER, RANGE, PAGES), packed=packed, residual=residual
            )
        )
    )
    seq.encodes = True
    held: list[set[int]] = [set() for _ in range(store.lanes.count)]
    merged = False
    for _ in range(data.draw(st.integers(1, 14))):
        action = data.draw(st.sampled_from(["chunk", "steps", "evict", "evict", "cut", "swap"]))
        if action == "chunk":
            close_holes(store, seq)
            count = data.draw(st.integers(1, 90))
            assert store.try_extend(seq, count)
            write(store, seq, store.append(seq, count), seq.seen - count)
            for lane in held:
                lane |= set(range(seq.seen - count, seq.seen))
        elif action == "steps":
            for _ in range(data.draw(st.integers(1, 40))):
                assert store.try_extend(seq, 1)
                write(store, seq, store.append_step([seq]), seq.seen - 1)
                for lane in held:
                    lane.add(seq.seen - 1)
        elif action == "evict":
            for _ in range(data.draw(st.integers(1, 60))):
                evict(store, seq, held, data.draw(st.integers(0, 10**6)))
                assert store.try_extend(seq, 1)
                write(store, seq, store.append_step([seq]), seq.seen - 1)
                for lane in held:
                    lane.add(seq.seen - 1)
            merged = True
        elif action == "cut":
            close_holes(store, seq)
            forget(store, seq, held, data.draw(st.integers(0, 10**6)))
            merged = True
        else:
            swapped = swapper.try_swap_out(seq)
            assert swapped is not None and store.books().used == 0
            back = swapper.try_swap_in(swapped)
            assert back is seq
        assert kept_positions(store, seq) == [sorted(lane) for lane in held]
        spread = SPAN if merged else GROUP  # a block spans this many positions at most
        check_contents(store, seq, spread / SPAN / (15 if packed is Format.INT4 else 3) + 1e-2)
        check_blocks(store, seq)
        if seq.seen > SPAN - 130:
            break
    store.close(seq)
    assert store.books().used == 0


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data(), residual=st.sampled_from([0, 5, 40]), packed=st.sampled_from([Format.INT4, Format.INT2]))
def test_random_schedules_long(data: st.DataObject, residual: int, packed: Format) -> None:
    test_random_schedules.hypothesis.inner_test(data, residual, packed)


def evict(store: KVStore, seq: Sequence, held: list[set[int]], seed: int) -> None:
    """Evict a random token of each lane that has one."""
    generator = torch.Generator().manual_seed(seed)
    for group in seq.layout.groups:
        slots = lane_slots(store, [seq], group)
        if not slots.live.shape[-1]:
            continue
        scores = torch.rand(slots.live.shape, generator=generator).masked_fill(~slots.live, -1.0)
        victims = scores.argmax(dim=-1).masked_fill(~slots.live.any(dim=-1), -1)
        for lane, victim, positions in zip(group.lanes.tolist(), victims[0].tolist(), slots.positions[0], strict=True):
            if victim >= 0:
                held[lane].remove(int(positions[victim]))
        open_holes(store, [seq], group, victims, slots.num_old)


def forget(store: KVStore, seq: Sequence, held: list[set[int]], seed: int) -> None:
    """Keep a random part of each lane."""
    generator = torch.Generator().manual_seed(seed)
    for group in seq.layout.groups:
        slots = lane_slots(store, [seq], group)
        kept = slots.live[0] & (torch.rand(slots.live.shape[1:], generator=generator) < 0.6)
        order = kept.logical_not().int().sort(dim=1, stable=True).indices
        for lane, mask, positions in zip(group.lanes.tolist(), kept, slots.positions[0], strict=True):
            held[lane] = set(positions[mask].tolist())
        cut(store, [seq], group, order[None], kept.sum(dim=1)[None], slots.num_old)


def test_half_empty_blocks_are_merged() -> None:
    store = KVStore(MIXED, Format.FP32, 1 << 20, block_size=GROUP)
    seq = store.open(
        store.layout(
            uniform_cache(MIXED, Format.FP16, GROUP, (SUMS,), derived=(NUMBER, RANGE, PAGES), packed=Format.INT2)
        )
    )
    seq.encodes = True
    assert store.try_extend(seq, 4 * GROUP)
    write(store, seq, store.append(seq, 4 * GROUP), 0)
    assert store.try_extend(seq, 1)  # encodes what was stored
    assert seq.encoded is not None and int(store.length[seq.encoded.row, 0]) == 4 * GROUP
    before = store.allocated_bytes(seq)
    group = seq.layout.groups[0]
    kept = torch.cat([torch.arange(16), torch.arange(40, 50), torch.arange(96, 128)]).expand(len(group.lanes), -1)
    count = torch.full((1, len(group.lanes)), kept.shape[1])
    cut(store, [seq], group, kept[None], count, num_old=4 * GROUP)
    assert [int(store.length[seq.encoded.row, lane]) for lane in LANES[:2]] == [2 * GROUP, 2 * GROUP]
    assert store.allocated_bytes(seq) < before
    assert kept_positions(store, seq)[0] == kept[0].tolist()


def test_what_is_said_of_blocks_holds_after_tokens_were_sorted() -> None:
    store = KVStore(MIXED, Format.FP32, 1 << 20, block_size=GROUP)
    seq = store.open(
        store.layout(
            uniform_cache(MIXED, Format.FP16, GROUP, (SUMS,), derived=(NUMBER, RANGE, PAGES), packed=Format.INT4)
        )
    )
    assert store.try_extend(seq, 3 * GROUP)
    write(store, seq, store.append(seq, 3 * GROUP), 0)
    held = [set(range(seq.seen)) for _ in range(store.lanes.count)]
    for seed in range(9):  # each new token lies where an old one was
        evict(store, seq, held, seed)
        assert store.try_extend(seq, 1)
        write(store, seq, store.append_step([seq]), seq.seen - 1)
        held = [lane | {seq.seen - 1} for lane in held]
    seq.encodes = True
    assert store.try_extend(seq, 1)
    assert seq.encoded is not None and int(store.length[seq.encoded.row, 0]) == 3 * GROUP
    check_contents(store, seq, 1.0)


def test_full_pool_refuses_and_loses_nothing() -> None:
    store = KVStore(MIXED, Format.FP32, 64 << 10, block_size=GROUP)
    seq = store.open(
        store.layout(
            uniform_cache(MIXED, Format.FP16, GROUP, (SUMS,), derived=(NUMBER, RANGE, PAGES), packed=Format.INT4)
        )
    )
    seq.encodes = True
    while store.try_extend(seq, 16):
        write(store, seq, store.append(seq, 16), seq.seen - 16)
    assert kept_positions(store, seq) == [list(range(seq.seen))] * store.lanes.count
    check_contents(store, seq, GROUP / SPAN / 15 + 1e-2)
    store.arena.check()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match="block size of 16"):
        uniform_cache(MIXED, Format.FP16, 16, packed=Format.INT4)
    with pytest.raises(ConfigError, match="block size of 16"):
        Strategy.parse("kivi").plan(MIXED, Format.FP32, block_size=16)
    windowed = ModelShape(
        name="w", layers=(MIXED.layers[1],), hidden_size=8, vocab_size=50, max_positions=999, num_parameters=1
    )
    with pytest.raises(UnsupportedError, match="sliding window"):
        Strategy.parse("kivi").plan(windowed, Format.FP32)
