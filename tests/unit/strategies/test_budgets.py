"""How budgets are divided: nothing is lost, nothing is given twice, nobody starves, and bounds hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kvatlas.core.errors import CompositionError, ConfigError, UnsupportedError
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format
from kvatlas.strategies.budget.ada import Ada
from kvatlas.strategies.budget.pyramid import Pyramid
from kvatlas.strategies.strategy import Strategy

INF = float("inf")


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 3), layers=st.integers(1, 3), heads=st.integers(1, 5),
    slots=st.integers(4, 40), floor=st.floats(0, 1), certain=st.integers(0, 3), ties=st.booleans(), data=st.data(),
)  # fmt: skip
def test_heads_share_all_of_a_layers_budget(seed, batch, layers, heads, slots, floor, certain, ties, data) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, layers, heads, slots, generator=generator) * torch.rand(heads, 1, generator=generator)
    scores = scores.round() if ties else scores
    scores[..., :certain] = INF
    too_many = scores.clone().fill_(INF)
    kept = torch.tensor([[data.draw(st.integers(certain + 1, slots)) for _ in range(layers)] for _ in range(batch)])
    ada = Ada(floor=floor)
    counts = ada.counts(scores, kept)
    assert counts.shape == (batch, layers, heads) and counts.dtype == torch.int64
    assert torch.equal(counts.sum(dim=-1), heads * kept), "the layer's budget, to the last token"
    assert torch.equal(ada.counts(too_many, kept), kept[..., None].expand(-1, -1, heads)), "certain or not"
    assert int(counts.min()) >= certain and bool((counts - certain >= floor * (kept[..., None] - certain) - 1).all())
    for index in range(layers):
        for row in range(batch):
            assert int(counts[row, index].max()) <= ada.most_of_lane(int(kept[row, index]), heads)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6), heads=st.integers(1, 6), slots=st.integers(1, 30), floor=st.floats(0, 1),
    data=st.data(),
)  # fmt: skip
def test_shares_are_the_floor_and_the_best_of_all_heads(seed, heads, slots, floor, data) -> None:
    """Counted score by score; a share is rounded up or down, no more."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(heads, slots, generator=generator) * torch.rand(heads, 1, generator=generator)
    kept = data.draw(st.integers(1, slots))
    ranked = sorted(((score, head) for head, row in enumerate(scores.tolist()) for score in row), reverse=True)
    winners = [head for _, head in ranked[: heads * kept]]
    counts = Ada(floor=floor).counts(scores[None, None], torch.tensor([[kept]]))[0, 0].tolist()
    for head, count in enumerate(counts):
        share = floor * kept + (1 - floor) * winners.count(head)
        assert abs(count - share) < 1 and count <= slots


@given(kept=st.integers(1, 30), heads=st.integers(1, 6))
def test_equal_heads_keep_as_much(kept: int, heads: int) -> None:
    row = torch.randperm(40, generator=torch.Generator().manual_seed(kept)).float()
    counts = Ada(floor=0.0).counts(row.expand(1, 1, heads, -1), torch.tensor([[kept]]))
    assert int(counts.max() - counts.min()) <= 1
    uneven = torch.stack([row + 100 * head for head in range(heads)])[None, None]
    assert Ada(floor=1.0).counts(uneven, torch.tensor([[kept]])).flatten().tolist() == [kept] * heads


@given(kept=st.integers(1, 30), heads=st.integers(1, 6), floor=st.sampled_from([0.0, 0.2, 1.0]))
def test_equal_scores_go_round_among_the_heads(kept: int, heads: int, floor: float) -> None:
    """Votes may underflow to zero for most tokens."""
    counts = Ada(floor=floor).counts(torch.zeros(1, 1, heads, 40), torch.tensor([[kept]]))
    assert int(counts.max() - counts.min()) <= 1 and int(counts.sum()) == heads * kept


def test_the_head_with_the_best_scores_keeps_most() -> None:
    scores = torch.stack([torch.arange(20.0), torch.arange(20.0) + 100])[None, None]
    assert Ada(floor=0.0).counts(scores, torch.tensor([[8]])).flatten().tolist() == [0, 16]
    assert Ada(floor=0.5).counts(scores, torch.tensor([[8]])).flatten().tolist() == [4, 12]


def test_padding_is_nobodys() -> None:
    """Slots without a token win nothing, however few there are."""
    scores = torch.full((1, 1, 2, 12), -INF)
    scores[0, 0, :, :5] = torch.randn(2, 5)
    assert int(Ada(floor=0.0).counts(scores, torch.tensor([[4]])).sum()) == 8


@given(
    kept=st.integers(2, 500), recent=st.integers(0, 40), prompt=st.integers(1, 1000), layers=st.integers(1, 40),
    beta=st.integers(1, 50),
)  # fmt: skip
def test_layers_share_a_budget(kept: int, recent: int, prompt: int, layers: int, beta: int) -> None:
    kept = max(kept, recent + 1)
    shares = [Pyramid(beta=beta).of_layer(kept, recent, prompt, layer, layers) for layer in range(layers)]
    assert shares == sorted(shares, reverse=True) and min(shares) > recent
    if prompt <= kept:
        assert shares == [kept] * layers, "nothing to divide"
        return
    assert max(shares) <= prompt and len({high - low for high, low in pairwise(shares)}) <= 1, "equal steps"
    more = sum(shares) - layers * kept
    assert 0 <= more <= layers * max(0, layers - 2) / 2, "steps are whole tokens, what is left of them is kept"
    if beta == 1 or layers == 1:
        assert shares == [kept] * layers


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("ada", CompositionError, "'ada' cannot stand alone: it divides what a stage keeps"),
        ("full | ada", CompositionError, "'ada' cannot stand alone"),
        ("kivi | pyramid", CompositionError, "'pyramid' cannot stand alone"),
        ("tova | ada", CompositionError, "'tova' and 'ada' cannot be composed: it keeps the same tokens in all heads"),
        ("snapkv | ada | pyramid", CompositionError, "both answer the axis 'budget'"),
        ("snapkv | ada(floor=1.5)", ConfigError, "ada: floor=1.5 is out of range"),
        ("snapkv | ada(floor=nan)", ConfigError, "ada: floor=nan is out of range"),
        ("snapkv | pyramid(beta=0)", ConfigError, "pyramid: beta=0 is out of range"),
        ("snapkv(layers=3-1)", ConfigError, "snapkv: layers=3-1 is not understood; write 0-1, 2- or 5"),
        ("h2o(layers=0-4) | snapkv(layers=4-)", CompositionError, "give them different layers"),
        ("h2o(budget=0.2, heavy=0.3)", ConfigError, "h2o: budget is heavy and recent together"),
        ("streaming_llm(budget=9, recent=4)", ConfigError, "streaming_llm: budget is sinks and recent together"),
        ("knorm(budget=14)", ConfigError, "knorm: budget=14 must exceed sinks + recent"),
        (
            "streaming_llm | pyramid",
            CompositionError,
            "'streaming_llm' and 'pyramid' cannot be composed: what a",
        ),
        ("snapkv(layers=0-1) | ada(layers=2-)", CompositionError, "'ada' cannot stand alone"),
        ("offload(host, layers=2-) | rehearse(layers=0-1)", CompositionError, "'rehearse' cannot stand alone"),
        ("tova(budget=0)", ConfigError, "tova: budget=0 is out of range"),
    ],
)
def test_refused(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as refusal:
        Strategy.parse(text)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["tova(layers=9-)", "quest(layers=7-)", "kivi(layers=3-4)", "offload(host, layers=5)"])
def test_layers_that_a_model_does_not_have(text: str) -> None:
    layer = LayerShape(num_query_heads=2, num_kv_heads=1, key_dim=8, value_dim=8)
    shape = ModelShape(
        name="small", layers=(layer,) * 3, hidden_size=8, vocab_size=9, max_positions=99, num_parameters=1
    )
    with pytest.raises(UnsupportedError, match=r"is for no layer of small .*; it has 3 layers"):
        Strategy.parse(text).plan(shape, Format.FP32)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("h2o(budget=0.2)", "h2o(heavy=0.1, recent=0.1)"),
        ("h2o(budget=101)", "h2o(heavy=51, recent=50)"),
        ("snapkv(budget=0.25) | ada", "snapkv(budget=0.25, window=32, pool=5, pooling=mean) | ada(floor=0.2)"),
        ("full(layers=03) | tova(layers=04-4)", "full(layers=3) | tova(layers=4)"),
        ("h2o(layers=0-1) | snapkv(layers=2-)", "snapkv(layers=2-) | h2o(layers=0-1)"),
    ],
)
def test_one_word_for_size(text: str, same: str) -> None:
    assert Strategy.parse(text) == Strategy.parse(same)


def test_streaming_llm_takes_a_budget_as_a_share() -> None:
    (stage,) = Strategy.parse("streaming_llm(sinks=4, budget=0.1)").stages
    assert stage.limits(1000).high == 100 and stage.reach(1000).recent == 96
    assert str(Strategy((stage,))) == "streaming_llm(sinks=4, budget=0.1)"
