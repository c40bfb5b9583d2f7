"""Limits that no stage of ours has yet: cuts of many tokens in steps, scores from keys in steps, odd scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from tests.driving import Job, assert_empty, drive, loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import ConfigError
from kvatlas.core.plan import NOTHING, Traits
from kvatlas.engine import eviction
from kvatlas.engine.engine import Engine
from kvatlas.models.loading import LoadedModel
from kvatlas.strategies.budget.ada import Ada
from kvatlas.strategies.encode.kivi import Kivi
from kvatlas.strategies.place.offload import Offload
from kvatlas.strategies.stage import Keep, Limits, Received, StageInfo
from kvatlas.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Sawtooth(Keep):
    """Keeps ``low`` tokens after a prompt and whenever there are ``high``: the newest, or those of the longest keys."""

    name: ClassVar[str] = "sawtooth"
    info: ClassVar[StageInfo] = StageInfo(summary="test", paper="none", traits=NOTHING)
    sizes: ClassVar[frozenset[str]] = frozenset({"low", "high"})

    low: int = 8
    high: int = 14
    by: str = "age"

    def limits(self, prompt_tokens: int) -> Limits:
        return Limits(after_prompt=self.low, high=self.high, low=self.low)

    def scores(self, view):
        if self.by == "age":
            return view.positions_BHS.float()
        if self.by == "keys":
            return view.keys().norm(dim=-1)
        return torch.full(view.positions_BHS.shape, {"nan": torch.nan, "inf": torch.inf, "none": -torch.inf}[self.by])


@dataclass(frozen=True, kw_only=True)
class OneByOne(Sawtooth):
    """Evicts one token at each step."""

    name: ClassVar[str] = "one_by_one"

    high: int = 9


@cache
def model(family: str = "llama") -> LoadedModel:
    return loaded(tiny_model(family))


def job(strategy: Strategy, prompt: int = 30, outputs: int = 25, seed: int = 0) -> Job:
    ids = token_ids(prompt + outputs, seed=seed)[0].tolist()
    return Job(ids[:prompt], ids[prompt:], strategy)


def run(*jobs: Job, family: str = "llama", interrupt_every: int | None = None, **options) -> Engine:
    options = {"kv_memory": "4MiB", "host_memory": "4MiB", "block_size": 4, "max_batched_tokens": 64, **options}
    engine = Engine(model(family), **options)
    drive(engine, jobs, interrupt_every=interrupt_every)
    for done in jobs:
        footprint = done.request.footprint
        assert done.request.peak_bytes <= footprint.peak_bytes
    assert_empty(engine)
    return engine


def held(low: int, high: int, prompt: int) -> Iterator[list[int]]:
    """Yield the newest positions that are left after the prompt and after each step."""
    kept = list(range(prompt))[-low:]
    while True:
        yield kept
        kept = [*kept, kept[-1] + 1]
        kept = kept[-low:] if len(kept) >= high else kept


def test_cuts_of_many_tokens_in_steps() -> None:
    jobs = [job(Strategy((Sawtooth(low=low, high=high),)), seed=low) for low, high in ((8, 14), (5, 6), (9, 11))]
    run(*jobs)
    for done, (low, high) in zip(jobs, ((8, 14), (5, 6), (9, 11)), strict=True):
        for step, wanted in zip(done.kept, held(low, high, 30), strict=False):
            assert all(lane == wanted for lane in step), (low, high)


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
@pytest.mark.parametrize("others", [(), (Offload(),), (Ada(floor=0.2),), (Ada(floor=0.2), Offload())], ids=str)
def test_in_company_and_interrupted(others: tuple, family: str) -> None:
    jobs = [job(Strategy((Sawtooth(by=by), *others)), seed=n) for n, by in enumerate(["age", "keys", "keys"])]
    again = [Job(one.prompt, one.outputs, one.strategy) for one in jobs]
    alone = [Job(one.prompt, one.outputs, one.strategy) for one in jobs]
    run(*jobs, family=family)
    run(*again, family=family, interrupt_every=4)
    for one in alone:
        run(one, family=family)
    for together, interrupted, by_itself in zip(jobs, again, alone, strict=True):
        assert together.kept == by_itself.kept == interrupted.kept


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = [Strategy((Sawtooth(by="keys"), Ada())), Strategy((Sawtooth(by="keys"), Kivi(bits=4, residual=4)))]
    whole = [job(strategy, seed=3) for strategy in strategies]
    run(*whole, block_size=32)
    monkeypatch.setattr(eviction, "_TILE_BYTES", 1)
    monkeypatch.setattr(eviction, "_TILE_SLOTS", 1)
    tiles = [job(strategy, seed=3) for strategy in strategies]
    run(*tiles, block_size=32)
    assert [one.kept for one in whole] == [one.kept for one in tiles]


def full() -> Job:
    """Return a long request that leaves stale ids and positions behind."""
    return Job(token_ids(80)[0].tolist(), [5, 6], Strategy.parse("full"))


@pytest.mark.parametrize("others", [(), (Kivi(bits=4, residual=4),)], ids=str)
@pytest.mark.parametrize("by", ["nan", "inf", "none"])
def test_scores_that_say_nothing_keep_the_newest(by: str, others: tuple) -> None:
    """Of equal scores the newest token's count more, whatever they are; slots that hold no token are nobody's."""
    jobs = [job(Strategy((Sawtooth(by=by), *others)), prompt=n, seed=n) for n in (60, 9, 30)]
    run(full(), *jobs, block_size=32)
    for done, prompt in zip(jobs, (60, 9, 30), strict=True):
        for step, wanted in zip(done.kept, held(8, 14, prompt), strict=False):
            assert all(lane == wanted for lane in step), prompt
    for by_one in ("nan", "inf"):
        single = job(Strategy((OneByOne(by=by_one),)), prompt=30)
        run(full(), single, job(Strategy((OneByOne(by=by_one),)), prompt=60, seed=60))
        newest = [max(max(lane) for lane in step) for step in single.kept]
        assert newest == list(range(29, 29 + len(newest))) or by_one == "inf"
        assert all(len(lane) == 8 for step in single.kept for lane in step)


def test_a_budget_that_gives_too_much_ends_its_request_alone() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Generous(Ada):
        name: ClassVar[str] = "generous"

        def counts(self, scores_BLHS, kept_BL):
            return super().counts(scores_BLHS, kept_BL) + 1

    with pytest.raises(ValueError, match="gives the heads of a layer more than they may keep together"):
        run(job(Strategy((Sawtooth(), Generous()))))


def test_a_trait_that_cannot_be_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Claims(Sawtooth):
        name: ClassVar[str] = "claims"
        info: ClassVar[StageInfo] = StageInfo(summary="", paper="", traits=Traits(prompt_shareable=True))

        @property
        def received(self) -> Received:
            return Received()

    with pytest.raises(ConfigError, match="claims says that prompts are shareable, but it counts the attention of all"):
        Engine(model(), kv_memory="1MiB").add_request([1, 2, 3], None, Strategy((Claims(),)))
