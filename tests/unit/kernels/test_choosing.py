"""The best of each lane, and the blocks that are left: native and torch forms beside plain Python."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings, strategies as st

from kvatlas.kernels.choosing import choose_best, cut_blocks, native, torch_path
from kvatlas.kernels.native import Library, library

FORMS = [torch_path, *([native] if isinstance(library(), Library) else [])]
scores = st.one_of(st.sampled_from([0.0, 1.0, -math.inf, math.nan, math.inf]), st.floats(-5, 5, width=32))


def best(lane: list[float], number: int, always: int | None) -> list[int]:
    order = sorted((i for i, each in enumerate(lane) if each > -math.inf and i != always), key=lambda i: (-lane[i], i))
    taken = [always] if always is not None and number else []
    return sorted(taken + order[: max(0, number - len(taken))])


@settings(max_examples=150)
@given(data=st.data(), n=st.integers(1, 30), with_always=st.booleans())
def test_the_best_are_chosen(data: st.DataObject, n: int, with_always: bool) -> None:
    lanes = [data.draw(st.lists(scores, min_size=n, max_size=n)) for _ in range(4)]
    number = [data.draw(st.integers(0, n + 3)) for _ in range(4)]
    always = [data.draw(st.integers(0, n - 1)) for _ in range(4)] if with_always else [None] * 4
    most = max(1, *number)
    for form in FORMS:
        index, count = form.choose_best(
            torch.tensor(lanes).view(2, 2, n),
            torch.tensor(number).view(2, 2),
            torch.tensor(always).view(2, 2) if with_always else None,
            min(most, n),
        )
        for lane in range(4):
            got = index.view(4, -1)[lane], int(count.view(4)[lane])
            assert got[0][: got[1]].tolist() == best(lanes[lane], min(number[lane], most, n), always[lane])
            assert got[0][got[1] :].tolist() == [n - 1] * (len(got[0]) - got[1])


@settings(max_examples=150)
@given(data=st.data(), columns=st.integers(1, 12), first=st.integers(0, 5))
def test_chosen_blocks_are_cut_out(data: st.DataObject, columns: int, first: int) -> None:
    size, lanes = 8, 4
    length = [data.draw(st.integers(0, columns * size)) for _ in range(lanes)]
    chosen = [sorted(data.draw(st.sets(st.integers(0, columns + first + 3), max_size=9))) for _ in range(lanes)]
    most = max(1, *map(len, chosen))
    index = torch.tensor([each + [columns + first] * (most - len(each)) for each in chosen])
    table = torch.arange(lanes * columns, dtype=torch.int32).view(2, 2, columns)
    for form in FORMS:
        out, read = form.cut_blocks(
            table, torch.tensor(length).view(2, 2), index.view(2, 2, most),
            torch.tensor([len(each) for each in chosen]).view(2, 2), first, size,
        )  # fmt: skip
        for lane in range(lanes):
            held = [each - first for each in chosen[lane] if 0 <= each - first < -(-length[lane] // size)]
            used = sum(min(size, length[lane] - each * size) for each in held)
            assert int(read.view(-1)[lane]) == used
            assert out.view(lanes, -1)[lane, : len(held)].tolist() == [lane * columns + each for each in held]


def test_forms_are_dispatched() -> None:
    score = torch.tensor([[[3.0, 1.0, 2.0]]])
    index, count = choose_best(score, 2, torch.tensor([[1]]))
    assert index.tolist() == [[[0, 1]]] and count.tolist() == [[2]]
    table, read = cut_blocks(torch.tensor([[[7, 8, 9]]], dtype=torch.int32), torch.tensor([[20]]), index, count, 0, 8)
    assert table.tolist() == [[[7, 8]]] and read.tolist() == [[16]]
