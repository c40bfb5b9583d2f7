"""What is chosen for one sequence is its own: whoever shares the batch, and however scores tie."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st
from torch import Tensor

from kvatlas.engine.eviction import _best, _lowest
from kvatlas.kernels.choosing import choose_best
from kvatlas.strategies.attend.rehearse import choose

levels = st.sampled_from([2, 5, 1000])
"""Numbers that scores may take: few make ties, as heads do that prefer different tokens."""


def scores(seed: int, heads: int, group: int, slots: int, levels: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    below = -torch.randint(levels, (1, heads, group, slots), generator=generator).float() / levels * 8
    return below - below.amax(dim=-1, keepdim=True)


def padded(below: Tensor, slots: int) -> Tensor:
    return torch.nn.functional.pad(below, (0, slots - below.shape[-1]), value=-torch.inf)


def chosen(below: Tensor, alpha: float, most: list[int]) -> list[list[list[int]]]:
    choice = choose(below, alpha, torch.tensor(most)[:, None].expand(-1, below.shape[1]))
    rows = zip(choice.index_RHn.tolist(), choice.count_RH.tolist(), strict=True)
    return [[lane[:count] for lane, count in zip(lanes, counts, strict=True)] for lanes, counts in rows]


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1, 2, 8]), st.integers(1, 40), levels, levels)
def test_a_choice_does_not_depend_on_the_batch(
    seed: int, heads: int, group: int, slots: int, few: int, many: int
) -> None:
    a, b = scores(seed, heads, group, slots, few), scores(seed + 1, heads, group, 2 * slots + 1, many)
    most = [max(1, slots // 3), slots + 1]
    alone = chosen(a, 2.0, most[:1]) + chosen(b, 2.0, most[1:])
    assert chosen(torch.cat([padded(a, b.shape[-1]), b]), 2.0, most) == alone
    assert chosen(torch.cat([b, padded(a, b.shape[-1])]), 2.0, most[::-1]) == alone[::-1]


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 8]), st.integers(1, 40), levels, st.integers(1, 40))
def test_every_query_head_reads_its_best(seed: int, group: int, slots: int, levels: int, most: int) -> None:
    below = scores(seed, 2, group, slots, levels)
    lanes = chosen(below, 0.0, [most])[0]
    for lane, heads in zip(lanes, below[0], strict=True):
        assert lane == sorted(set(lane)) and len(lane) == len(lanes[0])
        for head in heads:
            assert int(head.argmax()) in lane
    assert len(lanes[0]) <= max(most, group)


@given(st.integers(0, 10**6), levels, st.lists(st.integers(1, 17), min_size=1, max_size=3))
def test_the_best_and_among_equals_the_earlier(seed: int, levels: int, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (len(counts), 2, 17), generator=generator).float()
    index, _ = choose_best(values, torch.tensor(counts)[:, None].expand(-1, 2), most=max(counts))
    for lanes, chosen_lanes, count in zip(values.tolist(), index.tolist(), counts, strict=True):
        for lane, slots in zip(lanes, chosen_lanes, strict=True):
            ranked = sorted(range(17), key=lambda slot: (-lane[slot], slot))
            assert slots[:count] == sorted(ranked[:count])


def test_scores_that_are_no_numbers_spoil_nobody() -> None:
    below = torch.cat([scores(1, 2, 2, 9, 1000), torch.full((1, 2, 2, 9), torch.nan)])
    assert chosen(below, 2.0, [3, 3])[0] == chosen(below[:1], 2.0, [3])[0]


def test_what_pads_is_never_chosen_before_scores_that_are_no_numbers() -> None:
    below = torch.zeros(1, 2, 2, 9)
    below[:, 1] = torch.nan
    assert chosen(padded(below, 20), 2.0, [9]) == chosen(below, 2.0, [9]) == [[[*range(5)]] * 2]


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 5]), st.integers(1, 20))
def test_what_is_evicted_does_not_depend_on_where_slots_lie(seed: int, levels: int, count: int) -> None:
    """Attention underflows to zero for many tokens at once; of equal tokens the older goes first."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (3, 20), generator=generator).float()
    order = torch.stack([torch.randperm(20, generator=generator) for _ in values])
    positions = torch.arange(20).expand(3, -1)
    shuffled = values.gather(1, order), positions.gather(1, order)
    kept = _best(*shuffled, count)
    for lane, slots, places in zip(values.tolist(), kept, shuffled[1], strict=True):
        ranked = sorted(range(20), key=lambda token: (lane[token], token), reverse=True)
        assert places[slots].tolist() == ranked[:count]
    victims = shuffled[1].gather(1, _lowest(*shuffled, torch.ones(3, 20, dtype=torch.bool))[:, None])
    assert victims[:, 0].tolist() == [
        min(range(20), key=lambda token: (lane[token], token)) for lane in values.tolist()
    ]
