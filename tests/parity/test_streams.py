"""What a stage keeps beside its tokens: one file says what, and storage carries it through everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from tests.driving import Job, assert_empty, drive
from tests.parity.test_engine import ids, model

from kvatlas.core.errors import CompositionError
from kvatlas.core.needs import Derived
from kvatlas.core.plan import Traits
from kvatlas.core.views import LaneView, TokenView
from kvatlas.core.vocabulary import Format
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.storage.arena import SideClass
from kvatlas.storage.eviction import lane_slots
from kvatlas.strategies import registry
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Attend, Keep, Limits, tokens_of
from kvatlas.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class AskedNorm(Keep):
    budget: int | float = 0.5

    def limits(self, prompt_tokens: int) -> Limits:
        return Limits.steady(tokens_of(self.budget, prompt_tokens))

    def scores(self, view: LaneView) -> torch.Tensor:
        return -view.keys().norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class RarelyCut(AskedNorm):
    def limits(self, prompt_tokens: int) -> Limits:
        return Limits(after_prompt=15, high=24, low=15)


@dataclass(frozen=True, kw_only=True)
class KeptNorm(AskedNorm):
    sizes = frozenset({"budget"})
    needs = (Derived("norm"), Derived("longest", every=None))

    def derive(self, name: str, tokens: TokenView) -> torch.Tensor:
        return tokens.keys().norm(dim=-1, keepdim=True)

    def merge(self, name: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.maximum(one, other)

    def scores(self, view: LaneView) -> torch.Tensor:
        norms = view.side("norm").squeeze(-1)
        torch.testing.assert_close(norms[view.valid_BHS], view.keys().norm(dim=-1)[view.valid_BHS])
        return -norms


@dataclass(frozen=True, kw_only=True)
class PackedNorm(KeptNorm):
    def scores(self, view: LaneView) -> torch.Tensor:
        norms, read = view.side("norm").squeeze(-1), view.keys().norm(dim=-1)
        torch.testing.assert_close(norms[view.valid_BHS], read[view.valid_BHS], rtol=0.15, atol=0.05)
        return -norms


@dataclass(frozen=True, kw_only=True)
class KeptAll(Keep):
    needs = KeptNorm.needs
    derive, merge = KeptNorm.derive, KeptNorm.merge


@dataclass(frozen=True, kw_only=True)
class NormReader(Attend):
    needs = (Derived("norm", 2),)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """Make the stages of this file known, to its tests alone."""
    drops, keeps = Traits(query_agnostic=True), Traits(keeps_all=True, prompt_shareable=True)
    given = {
        "asked_norm": (AskedNorm, drops), "kept_norm": (KeptNorm, drops), "packed_norm": (PackedNorm, drops),
        "kept_all": (KeptAll, keeps), "norm_reader": (NormReader, keeps),
        "rarely_cut": (RarelyCut, drops),
    }  # fmt: skip
    for name, (stage, traits) in given.items():
        register(name, summary="a stage of these tests", traits=traits)(stage)
    yield
    for name in given:
        del registry._STAGES[name]


RULES = (
    "{}(budget=20)",
    "{}(budget=20) | offload(host)",
    "{}(budget=20) | ada",
    "{}(budget=20) | int8",
    "{}(budget=20, layers=1-)",
)


def jobs(name: str, rule: str) -> list[Job]:
    return [Job(ids(n, n), ids(30, n + 1), rule.format(name)) for n in (37, 9, 50, 24)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_kept_is_what_would_be_read(family: str, rule: str) -> None:
    """In a batch, in chunks, swapped or made anew now and then: the same tokens stay, and the norms are theirs."""
    found = []
    for name in ("asked_norm", "kept_norm"):
        engine = Engine(
            model(family), kv_memory="8MiB", host_memory="8MiB", block_size=4, max_batched_tokens=13,
            enable_prefix_caching=False,
        )  # fmt: skip
        found.append(drive(engine, jobs(name, rule), interrupt_every=7))
        assert engine.store.books().used == 0
    for asked, kept in zip(*found, strict=True):
        assert asked.kept == kept.kept


def test_streams_survive_packing() -> None:
    """Old tokens are packed and merged; their norms stay those they were written with."""
    sentence = "packed_norm(budget=40) | kivi(bits=4, residual=8)"
    engine = Engine(model(), kv_memory="16MiB", max_batched_tokens=50, enable_prefix_caching=False)
    done = drive(engine, [Job(ids(n, n), ids(28, n + 1), sentence) for n in (99, 60)])
    assert all(len(lane) == 40 for job in done for lane in job.kept[-1])


@pytest.mark.parametrize("before", ["full", "kept_all", "quest(budget=8, dense=0)", "snapkv(budget=20, window=4)"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_who_adopts_a_prefix_makes_streams_of_it(family: str, before: str) -> None:
    engine = Engine(model(family), kv_memory="8MiB", block_size=4, max_batched_tokens=64)
    prompt = ids(41, 3)
    drive(engine, [Job(prompt, ids(4, 4), before)])
    request = engine.add_request(prompt, SamplingParams(max_tokens=9, ignore_eos=True), "kept_all")
    while len(request.output_ids) < 6:
        engine.step()
    assert request.adopted_tokens >= 32 and request.seq is not None
    slots = 0
    for group in request.seq.layout.groups:
        seen = lane_slots(engine.store, [request.seq], group)
        norms, live = seen.read("keys").norm(dim=-1), seen.live
        torch.testing.assert_close(seen.side("norm").squeeze(-1)[live], norms[live])
        blocks, table = seen.sides[0]
        longest = blocks.pool.view("longest")[table.long(), 0].squeeze(-1)
        wanted = norms.masked_fill(~live, 0).unflatten(-1, (-1, 4)).amax(dim=-1)
        torch.testing.assert_close(longest[wanted > 0], wanted[wanted > 0])
        slots += int(live.sum())
    assert slots > 0


def test_blocks_are_shared_whatever_lies_beside_them() -> None:
    engine = Engine(model(), kv_memory="8MiB", block_size=4, max_batched_tokens=64)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    held = []
    for sentence in ("full", "kept_all", "quest(budget=8, dense=0)"):
        request = engine.add_request(ids(41, 3), params, sentence)
        while len(request.output_ids) < 2:
            engine.step()
        held.append(engine.store.books().used_kv)
    a_prompt = held[0]
    assert held[2] < 1.4 * a_prompt, "forty tokens are there once"


def test_conversations_with_streams_can_be_forked() -> None:
    """Both go on as one would have gone on alone."""
    answers = []
    for fork in (False, True):
        llm = LLM(model(), "kept_all | quest(budget=8, dense=0)", kv_memory="8MiB", block_size=4)
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        with llm.session() as session:
            session.generate(ids(30, 1), params)
            if fork:
                with session.fork() as other:
                    other.generate(ids(11, 2), params)
            answers.append(session.generate(ids(9, 3), params).outputs[0].token_ids)
        assert llm.engine.store.books().used == 0
    assert answers[0] == answers[1]


def test_requests_that_differ_in_budgets_alone_share_calls_and_layouts() -> None:
    engine = Engine(model(), kv_memory="8MiB", block_size=4)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    requests = [engine.add_request(ids(30, n), params, f"kept_norm(budget={n})") for n in (12, 17)]
    engine.step()
    assert requests[0].plan.kind == requests[1].plan.kind
    assert requests[0].seq.layout is requests[1].seq.layout


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_a_cut_that_breaks_off_between_blocks_and_streams_loses_nothing(
    failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix cache has the blocks, too, so what is kept moves to new ones."""
    engine = Engine(model(), kv_memory="8MiB", block_size=4, max_batched_tokens=16)
    bombs, move = [failure], SideClass.move

    def broken(*given) -> None:
        if len(given[1][0]) and bombs:
            raise bombs.pop()("boom")
        move(*given)

    monkeypatch.setattr(SideClass, "move", broken)
    engine.add_request(
        ids(41, 3),
        SamplingParams(max_tokens=6, ignore_eos=True),
        "snapkv(budget=20, window=4) | quest(budget=8, dense=0)",
    )
    while engine.has_work:
        with suppress(KeyboardInterrupt):
            engine.step()
    assert not bombs
    assert_empty(engine)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_more_may_be_dropped_at_once_than_a_window_holds(family: str) -> None:
    engine = Engine(model(family), kv_memory="8MiB", block_size=4)
    (done,) = drive(engine, [Job(ids(37, 1), ids(30, 2), "rarely_cut")])
    assert len(done.kept) == 30 and max(len(lane) for kept in done.kept for lane in kept) <= 24


def test_two_streams_of_one_name_are_refused() -> None:
    with pytest.raises(CompositionError, match="kept_norm and norm_reader both keep 'norm'"):
        Strategy.parse("kept_norm | norm_reader").plan(model().adapter.shape, Format.FP32)
