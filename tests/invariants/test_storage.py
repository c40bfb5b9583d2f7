"""The store against a plain Python model, under random schedules of its operations.

The model of a sequence is a list of positions per lane. Every token's key and value hold numbers made of sequence,
lane and position, so that a slot with the right position and somebody else's bytes is found. All memory of both tiers
is NaN at first, and blocks are NaN again while nobody owns them. Sequences live on the device, or with some layers on
the host; beside their keys and values lie streams, some written by somebody, some made of keys, per slot and per block.
They are swapped out and in while others take the memory they leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count as counter

import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from kvatlas.core.layout import GRANULE
from kvatlas.core.plan import CachePlan, uniform_cache
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.streams import Stream
from kvatlas.core.views import TokenView
from kvatlas.core.vocabulary import Format
from kvatlas.storage.arena import Arena
from kvatlas.storage.eviction import (
    close_holes,
    compact_windows,
    cut,
    drop_passed_windows,
    lane_slots,
    open_holes,
)
from kvatlas.storage.lanes import KVGroup, LaneGroup
from kvatlas.storage.link import Link
from kvatlas.storage.prefix_cache import PrefixCache
from kvatlas.storage.sequence import LaneRow, Sequence, Slots
from kvatlas.storage.store import KVStore
from kvatlas.storage.streams import derive_run, derive_tokens
from kvatlas.storage.swap import SwappedSequence, Swapper

BLOCK = 3
WINDOW = 4
SUMS = Stream(name="received", fill=0.0)


def shown(keys: Tensor) -> TokenView:
    return TokenView(read=lambda _: keys)


class Maker:
    """Makes streams of keys: the number that each is made of, and the range of those of a block."""

    def derive(self, name: str, tokens: TokenView) -> Tensor:
        number = tokens.keys()[..., :1]
        return number if name == "number" else torch.cat([number, number], dim=-1)

    def merge(self, name: str, one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([torch.minimum(one, other)[..., 0], torch.maximum(one, other)[..., 1]], dim=-1)


NUMBER = (Stream(name="number", dtype="float16"), Maker())
RANGE = (Stream(name="range", width=2, every=None), Maker())
BESIDE = {"nothing": ((), ()), "sums": ((SUMS,), ()), "made": ((), (NUMBER, RANGE)), "all": ((SUMS,), (RANGE, NUMBER))}


def shape(*layers: LayerShape) -> ModelShape:
    return ModelShape(name="t", layers=layers, hidden_size=8, vocab_size=50, max_positions=999, num_parameters=1)


def layer(heads: int, key_dim: int, value_dim: int, window: int | None = None, shares: int | None = None) -> LayerShape:
    return LayerShape(
        num_query_heads=2 * heads, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim, window=window,
        shares_kv_with=shares,
    )  # fmt: skip


MIXED = shape(layer(2, 4, 4), layer(1, 6, 2, window=WINDOW), layer(2, 4, 4, shares=0), layer(1, 4, 4, window=WINDOW))
WINDOW_LANES = (2, 3)
PLACES = [(), (), (0, 1, 3), (1,), (0,)]
"""Layers on the host."""


def planned(format: Format | None, beside: str, place: tuple[int, ...]) -> CachePlan:
    streams, derived = BESIDE[beside]
    return uniform_cache(MIXED, format or Format.FP32, BLOCK, streams, derived=derived, host_layers=place)


@dataclass(eq=False)
class Model:
    """What a sequence must hold: for each lane, position -> the number its key and value are made of."""

    seq: Sequence
    tokens: list[int]
    lanes: list[dict[int, float]]
    cut: bool = False

    @property
    def plain(self) -> bool:
        """Whether all that lies beside its keys and values is made of these."""
        return len(self.streams) == len(self.seq.layout.groups[0].derived)

    @property
    def streams(self) -> list[str]:
        """Names of what lies beside its keys and values."""
        side = self.seq.layout.groups[0].side
        return [] if side is None else [stream.name for stream in side.layout.streams]


class StoreMachine(RuleBasedStateMachine):
    """Random operations; after each, the store holds what the model holds, and the books balance."""

    live = Bundle("live")

    @initialize(slabs=st.integers(1, 4), host_slabs=st.integers(0, 3))
    def start(self, slabs: int, host_slabs: int) -> None:
        self.store = _store(slabs, host_slabs)
        self.arenas = [self.store.arena] if self.store.host is None else [self.store.arena, self.store.host]
        self.cache = PrefixCache(self.store)
        self.swapper = Swapper(self.store, Link())
        self.models: list[Model] = []
        self.swapped: list[tuple[Model, SwappedSequence, object]] = []
        self.numbers = counter(1)
        self.published: dict[bytes, list[Tensor]] = {}
        self.poison()

    # Operations

    @rule(
        target=live,
        format=st.sampled_from([None, Format.FP16]),
        beside=st.sampled_from([*BESIDE]),
        place=st.sampled_from(PLACES),
    )
    def open(self, format: Format | None, beside: str, place: tuple[int, ...]) -> Model:
        place = place if self.store.host is not None else ()
        seq = self.store.open(self.store.layout(planned(format, beside, place)))
        model = Model(seq, [], [{} for _ in range(self.store.lanes.count)])
        self.models.append(model)
        return model

    @rule(model=live, count=st.integers(1, 8), token=st.integers(0, 1))
    def append(self, model: Model, count: int, token: int) -> None:
        close_holes(self.store, model.seq)
        if not self.extend(model, count):
            return
        first = len(model.tokens)
        slots = self.store.append(model.seq, count)
        model.tokens += [token] * count
        for row in range(count):
            self.write(model, slots, row, first + row)
        for group in model.seq.layout.groups:
            if group.derived:
                keys = self.keys(model, slots, group)
                table = self.store.table[model.seq.side.row, group.lanes]
                derive_run(group.side, group.derived, table, slots.index[0, group.lanes], shown(keys.transpose(0, 1)))

    @rule(models=st.lists(live, min_size=1, max_size=3, unique=True))
    def append_step(self, models: list[Model]) -> None:
        models = [m for m in models if m.seq.layout is models[0].seq.layout]
        models = [m for m in models if self.extend(m, 1)]
        if not models:
            return
        slots = self.store.append_step([m.seq for m in models])
        for row, model in enumerate(models):
            model.tokens.append(9)
            self.write(model, slots, row, len(model.tokens) - 1)
        for group in models[0].seq.layout.groups:
            if group.derived:
                keys, index = self.keys(models[0], slots, group), slots.index[:, group.lanes]
                length = self.store.length[torch.tensor([m.seq.row for m in models])][:, group.lanes]
                place = slots.side[:, group.lanes], slots.offset[:, group.lanes]
                fresh = index == length - 1
                derive_tokens(group.side, group.derived, *place, fresh, shown(keys[:, :, None]))

    @rule(model=live, data=st.data())
    def open_holes(self, model: Model, data: st.DataObject) -> None:
        if model.seq.shared or bool((self.store.hole[model.seq.row] >= 0).any()):
            return
        for group in model.seq.layout.groups:
            victims = []
            for lane in group.lanes.tolist():
                length = int(self.store.length[model.seq.row, lane])
                victims.append(data.draw(st.integers(-1, length - 1)))
                if victims[-1] >= 0:
                    position = int(self.slot(model, group, lane, torch.tensor(victims[-1]))[2])
                    del model.lanes[lane][position]
            open_holes(self.store, [model.seq], group, torch.tensor([victims]), num_old=0)
        model.cut = True

    @rule(model=live)
    def close_holes(self, model: Model) -> None:
        close_holes(self.store, model.seq)

    @rule(model=live, data=st.data())
    def keep_slots(self, model: Model, data: st.DataObject) -> None:
        """Cut lanes; blocks that the prefix cache has as well are left to it, whatever room there is."""
        if self.has_partners(model):
            return
        close_holes(self.store, model.seq)
        for group in model.seq.layout.groups:
            lengths = self.store.length[model.seq.row, group.lanes].tolist()
            chosen = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else [] for n in lengths]
            width = max(1, *map(len, chosen))
            kept = torch.zeros((len(chosen), width), dtype=torch.int64)
            for row, (lane, slots) in enumerate(zip(group.lanes.tolist(), chosen, strict=True)):
                kept[row, : len(slots)] = torch.tensor(slots, dtype=torch.int64)
                positions = set(self.slot(model, group, lane, kept[row, : len(slots)])[2].tolist())
                model.lanes[lane] = {p: n for p, n in model.lanes[lane].items() if p in positions}
            count = torch.tensor([[len(slots) for slots in chosen]])
            cut(self.store, [model.seq], group, kept[None], count, prefixes=self.cache)
        model.cut = True

    @rule(model=live)
    def drop_passed_windows(self, model: Model) -> None:
        drop_passed_windows(self.store, model.seq)
        if model.cut:
            return
        for lane in WINDOW_LANES:  # whole blocks that the next query cannot see, counted from the sequence's start
            first = max(0, (len(model.tokens) - WINDOW + 1) // BLOCK) * BLOCK
            model.lanes[lane] = {p: n for p, n in model.lanes[lane].items() if p >= first}

    @rule(model=live)
    def compact_windows(self, model: Model) -> None:
        if model.seq.shared:
            return
        close_holes(self.store, model.seq)
        compact_windows(self.store, model.seq, torch.ones(self.store.lanes.count, dtype=torch.bool))
        for lane in WINDOW_LANES:
            if len(model.lanes[lane]) >= WINDOW + BLOCK:  # else it is not worth the copy
                seen, model.cut = len(model.tokens), True
                model.lanes[lane] = {p: n for p, n in model.lanes[lane].items() if p > seen - WINDOW}

    @rule(target=live, model=live)
    def fork(self, model: Model) -> Model | MultipleResults:
        if model.cut:
            return multiple()
        child = Model(self.store.fork(model.seq), list(model.tokens), [dict(lane) for lane in model.lanes])
        self.models.append(child)
        return child

    @rule(model=live)
    def publish(self, model: Model) -> None:
        if not model.cut and model.plain:
            self.cache.publish(model.seq, model.tokens, "", 0)

    @rule(model=live, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def adopt(self, model: Model, tokens: list[int]) -> None:
        if model.tokens or model.seq.shared or not model.plain:
            return
        adopted = self.cache.adopt(model.seq, tokens, "", most=len(tokens) - 1)
        assert adopted % BLOCK == 0 and adopted < len(tokens)
        model.tokens = tokens[:adopted]
        for lane in range(len(model.lanes)):
            model.lanes[lane] = dict(self.read(model, lane))
            passed = max(0, (adopted - WINDOW + 1) // BLOCK) * BLOCK if lane in WINDOW_LANES else 0
            assert sorted(model.lanes[lane]) == list(range(passed, adopted))

    @rule(wanted=st.integers(1, 5000), on_host=st.booleans())
    def reclaim(self, wanted: int, on_host: bool) -> None:
        arena = self.arenas[-1 if on_host else 0]
        before = arena.books()
        freed = self.cache.reclaim(wanted, arena if on_host else None)
        after = arena.books()
        assert before.cached - after.cached == freed, "what is reclaimed was cached and is free now"
        assert freed >= min(wanted, before.cached), "cached bytes are reclaimable at any time"
        assert after.used == before.used

    @rule(model=live)
    def look(self, model: Model) -> None:
        """What is read of lanes: the tokens that are there, and what lies beside them."""
        for group in model.seq.layout.groups:
            if not bool((self.store.length[model.seq.row, group.lanes] > 0).any()):
                continue
            slots = lane_slots(self.store, [model.seq], group)
            for row, lane in enumerate(group.lanes.tolist()):
                live = slots.live[0, row]
                held = model.lanes[lane]
                assert sorted(slots.positions[0, row][live].tolist()) == sorted(held)
                numbers = [held[position] for position in slots.positions[0, row][live].tolist()]
                assert slots.read("keys")[0, row][live][:, 0].tolist() == numbers
                assert slots.read("values")[0, row][live][:, 0].tolist() == [-number for number in numbers]
                for name in {"received", "number"} & {*model.streams}:
                    assert slots.side(name)[0, row][live][:, 0].tolist() == numbers

    @rule(target=live, model=consumes(live))
    def swap_out(self, model: Model) -> Model | MultipleResults:
        """Out of the device and off its rows; or, where the host is full, as if nothing had been asked."""
        before = self.books(), self.rows(model)
        staging = 0 if model.seq.staging is None else self.store.row_bytes([model.seq.staging], self.store.arena)[0]
        used, moved = self.store.allocated_bytes(model.seq) - staging, model.seq.shared
        out = self.swapper.try_swap_out(model.seq)
        if out is None:
            assert (self.books(), self.rows(model)) == before
            if self.store.host is not None:
                assert used > 0, "what needs nothing fits"
            return model
        assert {row.row for row in model.seq.rows} == {-1}
        if not moved:  # shared blocks stay with their other owners
            assert self.books()[0].used == before[0][0].used - used - staging
            assert self.books()[1].used >= before[0][1].used + used
        self.models.remove(model)
        self.swapped.append((model, out, self.state(before[1])))
        return multiple()

    @rule(target=live, data=st.data())
    def swap_in(self, data: st.DataObject) -> Model | MultipleResults:
        """Back, slot by slot as it was; or, where the device is full, still out."""
        if not self.swapped:
            return multiple()
        place = data.draw(st.integers(0, len(self.swapped) - 1))
        model, out, state = self.swapped[place]
        before, taken, host_bytes = self.books(), list(self.store.tables.free_rows), out.host_bytes
        if self.swapper.try_swap_in(out) is None:
            assert (self.books(), self.store.tables.free_rows, out.host_bytes) == (before, taken, host_bytes)
            return multiple()
        assert self.state(self.rows(model)) == state, "lengths, holes and blocks per lane"
        if model.seq.staging is not None:
            assert not self.store.columns_held(model.seq.staging).any(), "buffers hold nothing worth keeping"
        self.swapped.pop(place)
        self.models.append(model)
        return model

    @rule(data=st.data())
    def drop_swapped(self, data: st.DataObject) -> None:
        if self.swapped:
            _, out, _ = self.swapped.pop(data.draw(st.integers(0, len(self.swapped) - 1)))
            self.swapper.drop(out)

    @rule(model=consumes(live))
    def close(self, model: Model) -> None:
        self.store.close(model.seq)
        self.models.remove(model)

    # What must hold

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        for model in self.models:
            assert model.seq.seen == len(model.tokens)
            for lane, wanted in enumerate(model.lanes):
                held = self.read(model, lane)
                assert dict(held) == wanted and len(held) == len(wanted)

    @invariant()
    def books_balance(self) -> None:
        unshared = not any(model.seq.shared for model in self.models + [model for model, _, _ in self.swapped])
        for arena, books in zip(self.arenas, self.books(), strict=True):
            arena.check()
            assert books.used + books.cached + books.free == books.total
            assert min(books.used, books.cached, books.free, books.used_kv, books.used_sidecars) >= 0
            assert books.used_kv + books.used_sidecars == books.used
            if unshared:
                waiting = sum(out.host_bytes for _, out, _ in self.swapped) if arena is self.store.host else 0
                held = sum(self.store.allocated_bytes(model.seq, arena) for model in self.models)
                assert books.used == held + waiting
        if unshared and not any(model.seq.layout.plan.host_layers for model in self.models):
            assert self.store.books().used_kv == sum(self.store.kv_bytes(model.seq) for model in self.models)

    @invariant()
    def what_is_published_stays(self) -> None:
        """Whoever cuts, evicts or goes on must leave the prefix cache what it has."""
        for digest, entry in self.cache._entries.items():
            held = [
                part[entry.ids[group.lanes].long()].clone()
                for group in entry.layout.groups
                for part in (group.blocks.positions, group.blocks.pool.keys, group.blocks.pool.values)
            ]
            was = self.published.setdefault(digest, held)
            assert all(torch.equal(one, other) for one, other in zip(held, was, strict=True))
        self.published = {digest: self.published[digest] for digest in self.cache._entries}

    @invariant()
    def tables_point_into_their_pools(self) -> None:
        """Kernels read whole table rows, behind a lane's end too; an id of another layout could lie outside."""
        for model in self.models:
            for row in model.seq.rows:
                for group in row.layout.groups:
                    assert (self.store.table[row.row, group.lanes] < len(group.blocks.raw)).all()

    @invariant()
    def poison(self) -> None:
        """Fill what nobody owns with NaN; last, because it runs after every operation."""
        for arena in self.arenas:
            self.poison_arena(arena)

    def poison_arena(self, arena: Arena) -> None:
        owned = torch.zeros(arena.total_bytes // GRANULE, dtype=torch.int32)
        for blocks in arena.classes():
            starts = blocks.ids((blocks.refs > 0).nonzero().flatten()).long()
            places = starts[:, None] + torch.arange(blocks.block_bytes // GRANULE)
            owned.index_add_(0, places.flatten(), torch.ones(places.numel(), dtype=torch.int32))
        assert not (owned > 1).any(), "two blocks overlap"
        arena._memory.view(-1, GRANULE)[owned == 0] = 0xFF

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for model in list(self.models):
            self.store.close(model.seq)
        for _, out, _ in self.swapped:
            self.swapper.drop(out)
        for arena in self.arenas:
            self.cache.reclaim(10**9, arena)
            assert arena.books().free == arena.books().total
            arena.check()

    # Helpers

    def extend(self, model: Model, count: int) -> bool:
        """Make room; a refusal changes nothing, and comes only where room is short."""
        before = self.books(), self.rows(model)
        staged = max(self.store.longest_on_host(model.seq)) + count
        needed = self.store.blocks_needed(model.seq, count, staged)
        short = self.store.short_of(needed)
        assert (self.books(), self.rows(model)) == before, "to ask takes nothing"
        if self.store.try_extend(model.seq, count, staged):
            assert short is None
            for arena, books, then in zip(self.arenas, self.books(), before[0], strict=True):
                taken = [number * group.blocks.block_bytes for group, number in needed if group.blocks.arena is arena]
                assert books.free == then.free - sum(taken)
            self.scribble(model)
            return True
        assert short in self.arenas, "somebody must be asked to give way"
        assert (self.books(), self.rows(model)) == before
        return False

    def has_partners(self, model: Model) -> bool:
        """Whether another sequence owns some block of a sequence, too."""
        return any(
            bool((group.blocks.arena.num_owners(group.blocks, ids) > 1 + self.cached(group, ids)).any())
            for group, ids in self.store.ids_between(model.seq, *self.span(model.seq))
        )

    def cached(self, group: LaneGroup, ids: Tensor) -> Tensor:
        """Return for each block of a group how many entries of the prefix cache own it."""
        owners = torch.zeros(len(ids), dtype=torch.int64)
        for entry in self.cache._entries.values():
            for other in entry.layout.groups:
                if other.blocks is group.blocks:
                    owners += torch.isin(ids, entry.ids[other.lanes]).long()
        return owners

    def scribble(self, model: Model) -> None:
        """Use the staging buffers, as a step would; nobody else may feel it."""
        row = model.seq.staging
        for group, ids in [] if row is None else self.store.ids_between(row, *self.span(row)):
            group.blocks.raw[ids.long()] = -1

    def span(self, row: LaneRow) -> tuple[Tensor, Tensor]:
        held = self.store.columns_held(row)
        return torch.zeros_like(held), held

    def books(self) -> list[object]:
        return [arena.books() for arena in self.arenas]

    def rows(self, model: Model) -> list[object]:
        """Return all that the tables say of a sequence: lengths, holes and block ids, row by row."""
        store = self.store
        return [
            (row is model.seq.staging, store.length[row.row].tolist(), store.hole[row.row].tolist(),
             [(group.blocks, ids.tolist()) for group, ids in store.ids_between(row, *self.span(row))])
            for row in model.seq.rows
        ]  # fmt: skip

    def state(self, rows: list[object]) -> list[object]:
        """Return what of `rows` a swap must not change: all but staging, and block ids by number only."""
        return [
            (length, hole, [(blocks, len(ids)) for blocks, ids in groups])
            for staging, length, hole, groups in rows
            if not staging
        ]

    def write(self, model: Model, slots: Slots, row: int, position: int) -> None:
        number = float(next(self.numbers) % 2000)  # exact in fp16
        for group in model.seq.layout.groups:
            block, offset = slots.block[row, group.lanes], slots.offset[row, group.lanes]
            group.blocks.pool.keys[block, offset] = number
            group.blocks.pool.values[block, offset] = -number
            if "received" in model.streams:
                sums, beside = group.side.pool.view("received"), slots.side[row, group.lanes]
                assert (sums[beside, offset] == 0.0).all()
                sums[beside, offset] = number
        for lane in model.lanes:
            lane[position] = number

    def keys(self, model: Model, slots: Slots, group: KVGroup) -> Tensor:
        """Return the keys of new tokens of one group as an engine has them at hand."""
        return group.blocks.pool.keys[slots.block[:, group.lanes], slots.offset[:, group.lanes]].float()

    def slot(
        self, model: Model, group: KVGroup, lane: int, slot: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return key [n, Dk], value [n, Dv], position [n] and what lies beside, by name, of slots [n]."""
        block, offset = self.store.table[model.seq.row, lane, slot // BLOCK].long(), slot % BLOCK
        beside: dict[str, Tensor] = {}
        if group.side is not None:
            place = self.store.table[model.seq.side.row, lane, slot // BLOCK].long()
            for name in model.streams:
                view = group.side.pool.view(name)
                beside[name] = view[place, offset // group.side.layout.every(name)]
        return (
            group.blocks.pool.keys[block, offset],
            group.blocks.pool.values[block, offset],
            group.blocks.positions[block, offset],
            beside,
        )

    def read(self, model: Model, lane: int) -> list[tuple[int, float]]:
        """Return (position, number) of each live slot; key, value and sum must agree."""
        group = next(group for group in model.seq.layout.groups if lane in group.lanes.tolist())
        slot = torch.arange(int(self.store.length[model.seq.row, lane]))
        slot = slot[slot != self.store.hole[model.seq.row, lane]]
        key, value, position, beside = self.slot(model, group, lane, slot)
        number = key[:, :1]
        assert (key == number).all() and (value == -number).all(), "torn or foreign bytes"
        for name, entries in beside.items():
            if name == "range":
                assert ((entries[:, :1] <= number) & (number <= entries[:, 1:])).all(), "a token outside of its block's"
            else:
                assert (entries.float() == number).all(), f"{name} of another token"
        return list(zip(position.tolist(), number[:, 0].tolist(), strict=True))


def _store(slabs: int, host_slabs: int) -> KVStore:
    """Return a store of a few small slabs, so that layouts compete for them."""
    slab = KVStore(MIXED, Format.FP32, 10**6, block_size=BLOCK).arena.slab_bytes
    return KVStore(MIXED, Format.FP32, slabs * slab, block_size=BLOCK, host_bytes=host_slabs * slab)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_store_long() -> None:
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=300, stateful_step_count=80, deadline=None))
