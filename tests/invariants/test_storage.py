"""The store against a plain Python model, under random schedules of its operations.

The model of a sequence is a list of positions per lane. Every token's key and value hold numbers made of sequence,
lane and position, so that a slot with the right position and somebody else's bytes is found. All memory is NaN at
first, and blocks are NaN again while nobody owns them.
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
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format, Sidecar
from kvatlas.storage.eviction import (
    close_holes,
    compact_windows,
    drop_passed_windows,
    keep_slots,
    lane_view,
    open_holes,
)
from kvatlas.storage.lanes import LaneGroup
from kvatlas.storage.prefix_cache import PrefixCache
from kvatlas.storage.sequence import Sequence, Slots
from kvatlas.storage.store import KVStore

BLOCK = 3
WINDOW = 4
PLAIN, SUMS = (Sidecar.POSITIONS,), (Sidecar.POSITIONS, Sidecar.COLUMN_SUMS)


def shape(*layers: LayerShape) -> ModelShape:
    return ModelShape(name="t", layers=layers, hidden_size=8, vocab_size=50, max_positions=999, num_parameters=1)


def layer(heads: int, key_dim: int, value_dim: int, window: int | None = None, shares: int | None = None) -> LayerShape:
    return LayerShape(
        num_query_heads=2 * heads, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim, window=window,
        shares_kv_with=shares,
    )  # fmt: skip


MIXED = shape(layer(2, 4, 4), layer(1, 6, 2, window=WINDOW), layer(2, 4, 4, shares=0), layer(1, 4, 4, window=WINDOW))
WINDOW_LANES = (2, 3)


@dataclass(eq=False)
class Model:
    """What a sequence must hold: for each lane, position -> the number its key and value are made of."""

    seq: Sequence
    tokens: list[int]
    lanes: list[dict[int, float]]
    cut: bool = False


class StoreMachine(RuleBasedStateMachine):
    """Random operations; after each, the store holds what the model holds, and the books balance."""

    live = Bundle("live")

    @initialize(slabs=st.integers(1, 4))
    def start(self, slabs: int) -> None:
        self.store = _store(slabs)
        self.cache = PrefixCache(self.store)
        self.models: list[Model] = []
        self.numbers = counter(1)
        self.poison()

    # Operations

    @rule(target=live, format=st.sampled_from([None, Format.FP16]), sums=st.booleans())
    def open(self, format: Format | None, sums: bool) -> Model:
        seq = self.store.open(self.store.layout(format, SUMS if sums else PLAIN))
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
            open_holes(self.store, [model.seq], group, torch.tensor([victims]))
        model.cut = True

    @rule(model=live)
    def close_holes(self, model: Model) -> None:
        close_holes(self.store, model.seq)

    @rule(model=live, data=st.data())
    def keep_slots(self, model: Model, data: st.DataObject) -> None:
        if model.seq.shared:
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
            keep_slots(self.store, model.seq, group, kept, torch.tensor([len(slots) for slots in chosen]))
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
        compact_windows(self.store, model.seq)
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
        if not model.cut and model.seq.layout.key[1] == PLAIN:
            self.cache.publish(model.seq, model.tokens, "", 0)

    @rule(model=live, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def adopt(self, model: Model, tokens: list[int]) -> None:
        if model.tokens or model.seq.shared or model.seq.layout.key[1] != PLAIN:
            return
        adopted = self.cache.adopt(model.seq, tokens, "")
        assert adopted % BLOCK == 0 and adopted < len(tokens)
        model.tokens = tokens[:adopted]
        for lane in range(len(model.lanes)):
            model.lanes[lane] = dict(self.read(model, lane))
            passed = max(0, (adopted - WINDOW + 1) // BLOCK) * BLOCK if lane in WINDOW_LANES else 0
            assert sorted(model.lanes[lane]) == list(range(passed, adopted))

    @rule(wanted=st.integers(1, 5000))
    def reclaim(self, wanted: int) -> None:
        before = self.store.books()
        freed = self.cache.reclaim(wanted)
        after = self.store.books()
        assert before.cached - after.cached == freed, "what is reclaimed was cached and is free now"
        assert freed >= min(wanted, before.cached), "cached bytes are reclaimable at any time"
        assert after.used == before.used

    @rule(model=live)
    def look(self, model: Model) -> None:
        """What a strategy is shown: the tokens that are there, and of these the ones a later query can see."""
        for group in model.seq.layout.groups:
            if not bool((self.store.length[model.seq.row, group.lanes] > 0).any()):
                continue
            view, live = lane_view(self.store, [model.seq], group, [0])
            for row, lane in enumerate(group.lanes.tolist()):
                assert sorted(view.positions_BHS[0, row][live[0, row]].tolist()) == sorted(model.lanes[lane])
                window = WINDOW if lane in WINDOW_LANES else 10**6
                visible = [p for p in sorted(model.lanes[lane]) if p > len(model.tokens) - window]
                assert sorted(view.positions_BHS[0, row][view.valid_BHS[0, row]].tolist()) == visible

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
        self.store.arena.check()
        books = self.store.books()
        assert books.used + books.cached + books.free == books.total
        assert min(books.used, books.cached, books.free, books.used_kv, books.used_sidecars) >= 0
        assert books.used_kv + books.used_sidecars == books.used
        if not any(model.seq.shared for model in self.models):
            assert books.used == sum(self.store.allocated_bytes(model.seq) for model in self.models)
            assert books.used_kv == sum(self.store.kv_bytes(model.seq) for model in self.models)

    @invariant()
    def tables_point_into_their_pools(self) -> None:
        """Kernels read whole table rows, behind a lane's end too; an id of another layout could lie outside."""
        for model in self.models:
            for group in model.seq.layout.groups:
                assert (self.store.table[model.seq.row, group.lanes] < len(group.blocks.keys)).all()

    @invariant()
    def poison(self) -> None:
        """Fill what nobody owns with NaN; last, because it runs after every operation."""
        arena = self.store.arena
        owned = torch.zeros(arena.total_bytes // GRANULE, dtype=torch.int32)
        for blocks in arena._classes.values():
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
        self.cache.reclaim(10**9)
        assert self.store.books().free == self.store.books().total
        self.store.arena.check()

    # Helpers

    def extend(self, model: Model, count: int) -> bool:
        """Make room; a refusal changes nothing, and comes only where room is short."""
        before = self.store.books(), self.store.columns_held(model.seq).tolist()
        needed = self.store.blocks_needed(model.seq, count)
        if self.store.try_extend(model.seq, count):
            taken = sum(number * group.blocks.block_bytes for group, number in needed)
            assert self.store.books().free == before[0].free - taken
            return True
        assert (self.store.books(), self.store.columns_held(model.seq).tolist()) == before
        return False

    def write(self, model: Model, slots: Slots, row: int, position: int) -> None:
        number = float(next(self.numbers) % 2000)  # exact in fp16
        for group in model.seq.layout.groups:
            block, offset = slots.block[row, group.lanes], slots.offset[row, group.lanes]
            group.blocks.keys[block, offset] = number
            group.blocks.values[block, offset] = -number
            if group.blocks.column_sums is not None:
                assert (group.blocks.column_sums[block, offset] == 0.0).all()
                group.blocks.column_sums[block, offset] = number
        for lane in model.lanes:
            lane[position] = number

    def slot(
        self, model: Model, group: LaneGroup, lane: int, slot: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return key [n, Dk], value [n, Dv], position [n] and sum [n] of slots [n]."""
        block, offset = self.store.table[model.seq.row, lane, slot // BLOCK].long(), slot % BLOCK
        sums = group.blocks.column_sums
        return (
            group.blocks.keys[block, offset],
            group.blocks.values[block, offset],
            group.blocks.positions[block, offset],
            None if sums is None else sums[block, offset],
        )

    def read(self, model: Model, lane: int) -> list[tuple[int, float]]:
        """Return (position, number) of each live slot; key, value and sum must agree."""
        group = next(group for group in model.seq.layout.groups if lane in group.lanes.tolist())
        slot = torch.arange(int(self.store.length[model.seq.row, lane]))
        slot = slot[slot != self.store.hole[model.seq.row, lane]]
        key, value, position, sums = self.slot(model, group, lane, slot)
        number = key[:, :1]
        assert (key == number).all() and (value == -number).all(), "torn or foreign bytes"
        assert sums is None or (sums == number[:, 0]).all()
        return list(zip(position.tolist(), number[:, 0].tolist(), strict=True))


def _store(slabs: int) -> KVStore:
    """Return a store of a few small slabs, so that layouts compete for them."""
    slab = KVStore(MIXED, Format.FP32, 10**6, block_size=BLOCK).arena.slab_bytes
    return KVStore(MIXED, Format.FP32, slabs * slab, block_size=BLOCK)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_store_long() -> None:
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=300, stateful_step_count=80, deadline=None))
