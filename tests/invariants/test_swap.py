"""Whole sequences swapped to the host and back, with others allocated in between: the store's machine, other schedules.

The machine's own schedules rarely have a full sequence out while others take its place. Here nearly all do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.invariants.test_storage import BESIDE, BLOCK, MIXED, PLACES, Model, StoreMachine, planned

from kvatlas.core.vocabulary import Format
from kvatlas.storage.link import Link
from kvatlas.storage.store import KVStore
from kvatlas.storage.swap import Swapper

OPERATIONS = ["append", "append", "append_step", "holes", "cut", "fork", "publish", "adopt", "reclaim", "open", "close"]
SWAPS = ["swap_out", "swap_out", "swap_in", "swap_in", "drop"]


class Driven(StoreMachine):
    """The machine without its bundles: models are chosen among those that are in the store."""

    def choose(self, data: st.DataObject) -> Model:
        if not self.models:
            return self.opened(data)
        return data.draw(st.sampled_from(self.models))

    def empty(self, data: st.DataObject, *besides: str) -> Model:
        format, beside = (data.draw(st.sampled_from(each)) for each in ([None, Format.FP16], besides))
        return self.open(format, beside, data.draw(st.sampled_from(PLACES)))

    def opened(self, data: st.DataObject) -> Model:
        model = self.empty(data, *BESIDE)
        self.append(model, data.draw(st.integers(1, 3 * BLOCK)), 0)
        return model

    def one(self, data: st.DataObject, operation: str) -> None:
        """Carry out an operation and check everything."""
        acts: dict[str, Callable[[], object]] = {
            "open": lambda: self.opened(data),
            "append": lambda: self.append(self.choose(data), data.draw(st.integers(1, 2 * BLOCK)), 0),
            "append_step": lambda: self.append_step([self.choose(data)]),
            "holes": lambda: self.open_holes(self.choose(data), data),
            "cut": lambda: self.keep_slots(self.choose(data), data),
            "fork": lambda: self.fork(self.choose(data)),
            "publish": lambda: self.publish(self.choose(data)),
            "adopt": lambda: self.adopt(self.empty(data, "nothing", "made"), [0] * 8),
            "reclaim": lambda: self.reclaim(300, data.draw(st.booleans())),
            "close": lambda: self.close(self.choose(data)),
            "swap_out": lambda: self.swap_out(self.choose(data)),
            "swap_in": lambda: self.swap_in(data),
            "drop": lambda: self.drop_swapped(data),
        }
        acts[operation]()
        self.holds_what_the_model_holds()
        self.what_is_published_stays()
        self.books_balance()
        self.tables_point_into_their_pools()
        self.poison()


def schedule(data: st.DataObject, length: int) -> None:
    machine = Driven()
    machine.start(data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3)))
    for _ in range(length):
        operations = SWAPS if data.draw(st.booleans()) else OPERATIONS
        machine.one(data, data.draw(st.sampled_from(operations)))
    machine.teardown()


SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(SETTINGS, max_examples=15)
@given(st.data())
def test_what_comes_back_is_what_went(data: st.DataObject) -> None:
    schedule(data, 25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(SETTINGS, max_examples=200)
@given(st.data())
def test_what_comes_back_is_what_went_long(data: st.DataObject) -> None:
    schedule(data, 60)


# By hand, bit for bit


def store(host_bytes: int, budget: int = 200_000) -> KVStore:
    return KVStore(MIXED, Format.FP32, budget, block_size=BLOCK, host_bytes=host_bytes)


def noise(kv: KVStore, rows) -> None:
    """Fill every block of some rows with random bits, NaN payloads and all."""
    for row in rows:
        held = kv.columns_held(row)
        for group, ids in kv.ids_between(row, torch.zeros_like(held), held):
            shape = (len(ids), group.blocks.raw.shape[1])
            group.blocks.raw[ids.long()] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def bits(kv: KVStore, row) -> list[torch.Tensor]:
    held = kv.columns_held(row)
    return [group.blocks.raw[ids.long()].clone() for group, ids in kv.ids_between(row, torch.zeros_like(held), held)]


@pytest.mark.parametrize("format", [None, Format.FP16])
@pytest.mark.parametrize("place", dict.fromkeys(PLACES), ids=str)
@pytest.mark.parametrize("tokens", [1, BLOCK, 2 * BLOCK + 1])
def test_every_bit_comes_back(format: Format | None, place: tuple[int, ...], tokens: int) -> None:
    kv, link = store(200_000), Link()
    swapper = Swapper(kv, link)
    seq = kv.open(kv.layout(planned(format, "all", place)))
    assert kv.try_extend(seq, tokens, staged=tokens)
    kv.append(seq, tokens)
    kv.hole[seq.row, 0] = 0
    noise(kv, seq.rows)
    kept = [row for row in seq.rows if row is not seq.staging]
    before = [bits(kv, row) for row in kept]
    length, device = kv.length[seq.row].tolist(), kv.allocated_bytes(seq)
    out = swapper.try_swap_out(seq)
    assert out is not None and kv.books().used == 0 and kv.host.books().used == out.host_bytes
    assert len(kv.tables.free_rows) == len(kv.table)
    other = kv.open(kv.layout(planned(None, "nothing", ())))
    assert kv.try_extend(other, 4 * BLOCK)
    kv.append(other, 4 * BLOCK)
    noise(kv, [other])
    foreign = bits(kv, other)
    assert swapper.try_swap_in(out) is seq
    for row, was in zip(kept, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(bits(kv, row), was, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bits(kv, other), foreign, strict=True)), "a neighbour was hit"
    assert kv.length[seq.row].tolist() == length and int(kv.hole[seq.row, 0]) == 0 and seq.seen == tokens
    staging = 0 if seq.staging is None else device - kv.allocated_bytes(seq)
    assert kv.allocated_bytes(seq) == device - staging
    moved = sum(kv.row_bytes(kept, kv.arena))
    assert link.to_host.num_bytes == link.to_device.num_bytes == moved
    assert (link.to_host.moves, link.to_device.moves) == ((1, 1) if moved else (0, 0)), "one move each way"
    kv.close(seq)
    kv.close(other)
    for arena in (kv.arena, kv.host):
        arena.check()
        assert arena.books().free == arena.books().total


def test_without_a_host_nothing_is_swapped() -> None:
    kv = store(0)
    seq = kv.open(kv.layout(planned(None, "nothing", ())))
    assert kv.try_extend(seq, 5)
    kv.append(seq, 5)
    assert Swapper(kv, Link()).try_swap_out(seq) is None
    assert seq.seen == 5 and kv.allocated_bytes(seq) == kv.books().used > 0


def test_a_swapped_fork_leaves_the_other_alone() -> None:
    kv = store(200_000)
    swapper = Swapper(kv, Link())
    seq = kv.open(kv.layout(planned(None, "nothing", (0, 1, 3))))
    assert kv.try_extend(seq, 7, staged=7)
    kv.append(seq, 7)
    noise(kv, [seq])
    was = bits(kv, seq)
    child = kv.fork(seq)
    out = swapper.try_swap_out(child)
    assert out is not None
    kv.close(seq)
    assert kv.books().used == 0 and kv.host.books().used == out.host_bytes > 0
    assert swapper.try_swap_in(out) is child
    assert all(torch.equal(a, b) for a, b in zip(bits(kv, child), was, strict=True))
    swapped = swapper.try_swap_out(child)
    assert swapped is not None
    swapper.drop(swapped)
    assert kv.host.books().free == kv.host.books().total
