"""What stages may ask for is what a plain forward of transformers says it is, in chunks, steps and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from tests.driving import loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import CapacityError, ConfigError
from kvatlas.core.needs import BELOW_MEAN, Logprobs, QueryMoments, Received, RecentQueries, Record
from kvatlas.core.plan import Traits
from kvatlas.core.views import LaneView, QueryView, Selection, TokenView
from kvatlas.core.vocabulary import Format
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.models.attention import AttentionCall
from kvatlas.models.dense_context import DenseContext, Segment
from kvatlas.models.loading import LoadedModel
from kvatlas.storage.eviction import lane_slots
from kvatlas.strategies import registry
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Attend, Keep, Limits
from kvatlas.strategies.strategy import Strategy

PROMPT, STEPS = 41, 9
LAST = 7
WAYS = [*product(("sum", "max"), ("sum", "max", "mean")), ("below_mean", "max"), ("below_mean", "mean")]


@dataclass(frozen=True, kw_only=True)
class Votes(Keep):
    """Keeps everything and counts what it receives."""

    over: str = "sum"
    heads: str = "sum"
    last: int = 0

    @property
    def needs(self) -> tuple[Received]:
        return (Received(queries=self.last or None, over=self.over, heads=self.heads, in_decode=not self.last),)


@dataclass(frozen=True, kw_only=True)
class Watcher(Keep):
    """Shows what it is shown of queries, and drops a token at every step."""

    needs = (RecentQueries(LAST), QueryMoments())
    shown: ClassVar[list[tuple[Any, ...]]] = []

    def limits(self, prompt_tokens: int) -> Limits:
        return Limits.steady(20)

    def scores(self, view: LaneView) -> torch.Tensor:
        mean, second = view.query_moments()
        for row, seen in enumerate(view.seen_B.tolist()):
            heads = view.layer_H.tolist()
            self.shown.extend(
                (heads[h], seen, h % view.heads, view.queries()[row, h], mean[row, h], second[row, h])
                for h in range(len(heads))
            )
        return view.positions_BHS.float()


@dataclass(frozen=True, kw_only=True)
class Centred(Keep):
    """Knows the mean of the prompt's keys."""

    needs = (Record("centre", unit="key_dim"),)
    shown: ClassVar[list[int]] = []

    def begin(self, prompt: TokenView) -> dict[str, torch.Tensor]:
        return {"centre": prompt.keys().mean(dim=1)}

    def limits(self, prompt_tokens: int) -> Limits:
        return Limits.steady(20)

    def scores(self, view: LaneView) -> torch.Tensor:
        if view.seen_B.tolist() == view.prompt_B.tolist():  # nothing is gone yet
            keys = view.keys().masked_fill(~view.valid_BHS[..., None], 0.0).sum(dim=2) / view.prompt_B[:, None, None]
            torch.testing.assert_close(view.record("centre"), keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(view.scale, torch.full_like(view.scale, view.key_dim**-0.5))
            self.shown.extend(view.prompt_B.tolist())
        return view.positions_BHS.float()


@dataclass(frozen=True, kw_only=True)
class Likely(Keep):
    """Keeps everything, and how likely it was; or few tokens, the least likely ones."""

    few: int = 0
    needs = (Logprobs(),)

    def limits(self, prompt_tokens: int) -> Limits:
        return Limits.steady(self.few) if self.few else Limits()

    def scores(self, view: LaneView) -> torch.Tensor:
        return -view.logprobs


@dataclass(frozen=True, kw_only=True)
class Placed(Attend):
    """Reads everything, and shows where the tokens it may choose of are."""

    shown: ClassVar[dict[int, list[list[int]]]] = {}

    def select(self, view: QueryView) -> Selection | None:
        places = view.positions()
        for row, seen in enumerate(view.seen_R.tolist()):
            assert view.prompt_R[row] == PROMPT
            assert places[row].gather(-1, view.newest_RH[row][:, None]).unique().tolist() == [seen - 1]
            self.shown[seen] = [sorted(each for each in lane if each >= 0) for lane in places[row].tolist()]
        return None


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """Make the stages of this file known, to its tests alone."""
    register("votes", summary="a stage of these tests", traits=Traits(keeps_all=True))(Votes)
    register("watcher", summary="a stage of these tests")(Watcher)
    register("likely", summary="a stage of these tests")(Likely)
    register("placed", summary="a stage of these tests", traits=Traits(keeps_all=True))(Placed)
    register("centred", summary="a stage of these tests")(Centred)
    yield
    del (
        registry._STAGES["votes"],
        registry._STAGES["watcher"],
        registry._STAGES["centred"],
        registry._STAGES["likely"],
        registry._STAGES["placed"],
    )


@cache
def plain() -> torch.nn.Module:
    own = tiny_model("llama", num_attention_heads=8, num_key_value_heads=2)
    own.set_attn_implementation("eager")
    return own


@cache
def model() -> LoadedModel:
    return loaded(tiny_model("llama", num_attention_heads=8, num_key_value_heads=2))


def attention(tokens: list[int]) -> torch.Tensor:
    """Return the probabilities [L, H, G, T, T] of a plain forward over all tokens."""
    own = plain()
    own.load_state_dict(model().adapter.model.state_dict())
    with torch.no_grad():
        found = own(torch.tensor([tokens]), output_attentions=True).attentions
    return torch.stack([layer[0].unflatten(0, (2, -1)) for layer in found])


def run(sentence: str) -> Iterator[tuple[Engine, Request]]:
    """Yield two requests that run together, each when all but the last of its output is cached."""
    engine = Engine(model(), kv_memory="8MiB", block_size=4, max_batched_tokens=13, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True)
    requests = [engine.add_request(token_ids(PROMPT, seed=n)[0].tolist(), params, sentence) for n in (1, 2)]
    while engine.has_work:
        engine.step()
        for request in requests:
            if request.seq is not None and len(request.output_ids) == STEPS:
                yield engine, request


@pytest.mark.parametrize("last", [0, LAST])
@pytest.mark.parametrize(("over", "heads"), WAYS)
def test_attention_received(over: str, heads: str, last: int) -> None:
    found = 0
    for engine, request in run(f"votes(over={over}, heads={heads}, last={last})"):
        tokens = request.tokens[:-1]
        (group,) = request.seq.layout.groups
        got = lane_slots(engine.store, [request.seq], group).side("received")[0, :, : len(tokens), 0]
        paid = {"sum": torch.sum, "max": torch.amax, "mean": torch.mean}[heads](attention(tokens), dim=2)
        counting = paid[:, :, PROMPT - last : PROMPT] if last else paid
        if over == "below_mean":
            seen = torch.arange(1, len(tokens) + 1)
            counting = ((paid * seen[:, None] < BELOW_MEAN) & (torch.arange(len(tokens)) < seen[:, None])).float()
            counting = counting[:, :, PROMPT - last : PROMPT] if last else counting
        wanted = counting.amax(dim=2) if over == "max" else counting.sum(dim=2)
        torch.testing.assert_close(got, wanted.flatten(0, 1), rtol=1e-4, atol=1e-5)
        found += 1
    assert found == 2


def likelihoods(tokens: list[int]) -> torch.Tensor:
    """Return the log-probability [T] of each token in a plain forward over all; of the first, 0."""
    own = plain()
    own.load_state_dict(model().adapter.model.state_dict())
    with torch.no_grad():
        found = own(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    return torch.cat([torch.zeros(1), found[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]])


@pytest.mark.parametrize("beside", ["", " | int8", " | offload(host)"])
def test_logprobs(beside: str) -> None:
    """In chunks and steps; what is rounded changes them a little, so they are compared loosely there."""
    found, loose = 0, 5e-2 if "int8" in beside else 1e-4
    for engine, request in run(f"likely{beside}"):
        tokens = request.tokens[:-1]
        (group,) = request.seq.layout.groups
        got = lane_slots(engine.store, [request.seq], group).side("logprobs")[0, :, : len(tokens), 0]
        torch.testing.assert_close(got, likelihoods(tokens).expand_as(got), rtol=loose, atol=loose)
        found += 1
    assert found == 2


@pytest.mark.parametrize("place", ["", " | offload(host)"])
def test_who_chooses_knows_positions(place: str) -> None:
    """Of the last layer, whose heads ask last; after a cut."""
    for engine, request in run(f"snapkv(budget=20, window=4) | placed{place}"):
        (group,) = request.seq.layout.groups
        slots = lane_slots(engine.store, [request.seq], group)
        kept = [sorted(where[live].tolist()) for where, live in zip(slots.positions[0], slots.live[0], strict=True)]
        assert Placed.shown[request.seq.seen] == kept[-2:]


def test_the_least_likely_tokens_stay() -> None:
    for engine, request in run("likely(few=20)"):
        (group,) = request.seq.layout.groups
        slots = lane_slots(engine.store, [request.seq], group)
        kept = slots.positions[0][:, : int(slots.live[0].sum(dim=-1)[0])]
        prompt = likelihoods(request.tokens[:PROMPT])  # of which the cut has taken 20; decode steps then took others
        worst = set(prompt.sort().indices[: 20 - STEPS].tolist())
        assert all(worst <= set(lane.tolist()) for lane in kept)


class Queries(DenseContext):
    """Keeps the queries of each layer, [Hq, T, D]."""

    def attend(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.asked[call.layer] = query[0]
        return super().attend(call, query, key, value)


def test_queries_are_those_that_came() -> None:
    """In chunks of a prompt, in steps of a batch, in a further turn, swapped in between."""
    Watcher.shown.clear()
    engine = Engine(model(), kv_memory="8MiB", host_memory="8MiB", block_size=4, max_batched_tokens=13)
    params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    request = engine.add_request(token_ids(PROMPT, seed=3)[0].tolist(), params, "watcher | offload(host)")
    other = engine.add_request(token_ids(9, seed=4)[0].tolist(), params, "watcher")
    request.held_by_session = True
    while engine.has_work:
        engine.step()
        if len(request.output_ids) == 4 and not engine.scheduler.num_swaps:
            engine.scheduler._preempt(request)
    engine.continue_request(request, token_ids(17, seed=5)[0].tolist(), params)
    while engine.has_work:
        engine.step()
    assert other.error is None and request.error is None and engine.scheduler.num_swaps
    first = [one for one in Watcher.shown if one[1] > 25]  # the other's is never so long
    # Attention over what is left changes later layers' queries, so only those of the first layer can be foretold.
    context = Queries()
    context.asked = {}
    tokens = torch.tensor(request.tokens)
    places = torch.arange(len(tokens))
    context.begin([Segment(sequence=0, start=0, num_tokens=len(tokens))])
    model().adapter.forward(tokens, places, context, places[:1], rope_tokens=len(tokens))
    asked = context.asked[0].unflatten(0, (2, -1))  # [H, G, T, D]
    checked = 0
    for layer, seen, lane, recent, mean, second in first:
        if layer:
            continue
        queries = asked[lane, :, :seen]
        torch.testing.assert_close(recent, queries[:, -LAST:].transpose(0, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean, queries.mean(dim=1), rtol=1e-4, atol=1e-4)
        products = torch.einsum("gtd,gte->gde", queries, queries) / seen
        torch.testing.assert_close(second, products, rtol=1e-3, atol=1e-3)
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("place", ["", " | offload(host)"])
def test_what_begins_after_the_prompt_sees_all_of_it(place: str) -> None:
    Centred.shown.clear()
    assert sum(1 for _ in run(f"centred{place}")) == 2
    assert sorted(set(Centred.shown)) == [PROMPT]


def test_who_observes_a_whole_prompt_shares_none() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Sharing(Watcher):
        pass

    register("sharing", summary="a stage of these tests", traits=Traits(prompt_shareable=True))(Sharing)
    try:
        with pytest.raises(ConfigError, match="it observes all of a prompt"):
            Strategy.parse("sharing").plan(model().adapter.shape, Format.FP32)
    finally:
        del registry._STAGES["sharing"]


def test_a_record_that_no_block_can_hold_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Hoarder(Keep):
        needs = (Record("hoard", 10**6),)

    register("hoarder", summary="a stage of these tests")(Hoarder)
    try:
        engine = Engine(model(), kv_memory="8MiB", block_size=4)
        with pytest.raises(CapacityError, match=r"a block of 3\.81 MiB is larger than the"):
            engine.add_request([1, 2, 3], SamplingParams(), "hoarder")
    finally:
        del registry._STAGES["hoarder"]
