"""What stays on the device is what a literal least-recently-chosen list keeps, lane by lane, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from kvatlas.core.errors import UnsupportedError
from kvatlas.storage.lanes import LaneClasses
from kvatlas.storage.residents import ResidentSet, bring

HEADS, UNITS = 2, 12
Chosen = list[list[set[int]]]


def new() -> ResidentSet:
    return ResidentSet(row=0, layout=LaneClasses.__new__(LaneClasses))


class Told:
    """One lane: when each unit that it holds was last chosen."""

    def __init__(self) -> None:
        self.age: dict[int, int] = {}

    def bring(self, chosen: set[int], places: int, written: int | None, now: int, left: set[int]) -> None:
        """Check what is ``left``: of equally old units any may go."""
        before = set(self.age)
        assert chosen <= left <= before | chosen
        gone, spared = before - left - {written}, left - chosen
        over = max(0, len(before | chosen) - places)
        assert len(gone) in ({over} if written is None or written in chosen else {over, max(0, over - 1)})
        assert all(self.age[one] <= self.age[other] for one in gone for other in spared)
        assert written is None or written in chosen or written not in left
        self.age = {unit: now if unit in chosen else self.age[unit] for unit in left}


steps = st.lists(
    st.tuples(
        st.lists(st.lists(st.sets(st.integers(0, UNITS - 1), max_size=5), min_size=HEADS, max_size=HEADS), min_size=2,
                 max_size=2),
        st.lists(st.integers(0, UNITS - 1), min_size=2 * HEADS, max_size=2 * HEADS),
        st.booleans(),
    ),
    max_size=20,
)  # fmt: skip


@given(steps=steps, places=st.tuples(st.integers(5, 9), st.integers(5, 9)))
def test_it_is_a_list_of_the_last_chosen(steps: list[tuple[Chosen, list[int], bool]], places: tuple[int, int]) -> None:
    sets, told, holding = [new(), new()], [[Told() for _ in range(HEADS)] for _ in range(2)], {}
    for now, (chosen, written, writes) in enumerate(steps):
        most = max(len(lane) for row in chosen for lane in row) + 1
        unit, meant = torch.zeros((2, HEADS, most), dtype=torch.int64), torch.zeros((2, HEADS, most), dtype=torch.bool)
        for r, row in enumerate(chosen):
            for h, lane in enumerate(row):
                unit[r, h, : len(lane)] = torch.tensor(sorted(lane), dtype=torch.int64)
                meant[r, h, : len(lane)] = True
        changed = torch.tensor(written).view(2, HEADS) if writes else None
        place, missing = bring(sets, slice(3, 3 + HEADS), places, unit, meant, changed)
        for r, row in enumerate(chosen):
            for h, lane in enumerate(row):
                got = set(unit[r, h][missing[r, h]].tolist())
                assert lane - set(told[r][h].age) == got
                left = {each for each in sets[r].layers[3].held[h].tolist() if each >= 0}
                told[r][h].bring(lane, places[r], written[r * HEADS + h] if writes else None, now, left)
                where = place[r, h][meant[r, h]].tolist()
                assert len(set(where)) == len(where) and all(0 <= each < places[r] for each in where)
                assert ((place[r, h] >= 0) & (place[r, h] < places[r])).all()
                for each, at in zip(sorted(lane), where, strict=True):
                    if each not in got:
                        assert holding[r, h, at] == each, "what is not fetched is where it was put"
                    holding[r, h, at] = each


def test_more_than_there_is_room_for_is_refused() -> None:
    unit = torch.arange(6).expand(1, HEADS, 6)
    with pytest.raises(UnsupportedError, match="6 are chosen of a lane that has 5 places"):
        bring([new()], slice(0, HEADS), [5], unit, torch.ones_like(unit, dtype=torch.bool), None)


def test_who_forgets_fetches_anew_and_who_grows_does_not() -> None:
    one, unit = new(), torch.arange(4).expand(1, HEADS, 4)
    meant = torch.ones_like(unit, dtype=torch.bool)
    assert bring([one], slice(0, HEADS), [4], unit, meant, None)[1].all()
    assert not bring([one], slice(0, HEADS), [7], unit, meant, None)[1].any()
    assert bring([one], slice(HEADS, 2 * HEADS), [7], unit, meant, None)[1].all(), "another layer's"
    one.forget()
    assert bring([one], slice(0, HEADS), [7], unit, meant, None)[1].all()
