"""In company: an innocent request beside guests that fail, cancel, talk on, fork and press for memory, in one engine.

Its answer is compared token for token with the one it gets alone, and so is that of the next request.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import torch
from tests.driving import assert_empty, loaded
from tests.families import tiny_model
from tests.fuzz.guests import (
    FAULTS,
    POISON,
    TROUBLES,
    Guest,
    Interrupt,
    PoisonedAdapter,
    PoisonedTokenizer,
    calls,
    raise_refusals,
)
from tests.fuzz.harness import Case, Hang, Harm, Target
from tests.fuzz.values import odd
from tests.fuzz.workplace import Workplace

from kvatlas.core.errors import CapacityError, ConfigError, UnsupportedError
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import FinishReason, Request
from kvatlas.engine.sampler import sample
from kvatlas.models.loading import LoadedModel
from kvatlas.strategies.strategy import Strategy

MOST_STEPS = 3_000
CLEAR = 1e-3
"""Lead of the best token over the next, as a share of the logits' spread, below which rounding may change it."""

_FAMILIES = ("llama", "llama", "llama", "gemma3_text", "phi3")
# Beside other prompts chunks are cut elsewhere; so kivi begins to encode behind the prompts of innocents here.
_STRATEGIES = (
    *("full", "h2o(heavy=5, recent=4)", "snapkv(budget=9, window=4)", "streaming_llm(sinks=2, recent=9)", "int8"),
    *("offload(host)", "offload(host, false)", "infinigen", "h2o(heavy=5, recent=4) | offload(host)", "fp16"),
    *("kivi(bits=2, residual=64)", "quest(budget=24, dense=1)", "rehearse(alpha=2.0, cap=0.5) | offload(host)"),
)
_GUESTS = (
    *_STRATEGIES,
    "kivi(bits=4, residual=0)",
    "kivi(bits=2, residual=32) | h2o",
    "h2o(heavy=1, recent=1)",
    "quest | int8",
)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """An engine, told by what it is made with."""

    family: str
    block_size: int
    max_batched_tokens: int
    enable_prefix_caching: bool

    def engine(self, place: Workplace, **options: Any) -> Engine:
        """Return a new one; its tokenizer and model fail on poison."""
        model = LoadedModel(
            adapter=_model(self.family).adapter, tokenizer=PoisonedTokenizer(place.tokenizer), name=self.family
        )
        engine = Engine(
            model,
            block_size=self.block_size,
            max_batched_tokens=self.max_batched_tokens,
            enable_prefix_caching=self.enable_prefix_caching,
            **{"kv_memory": "4MiB", "host_memory": "4MiB"} | options,
        )
        engine._runner._adapter = PoisonedAdapter(engine._runner._adapter)  # type: ignore[assignment]
        return engine


@dataclass(frozen=True, kw_only=True)
class Innocent:
    """A request that does nothing odd."""

    strategy: str
    prompt_tokens: int
    output_tokens: int
    seed: int

    def add(self, engine: Engine) -> Request:
        params = SamplingParams(max_tokens=self.output_tokens, ignore_eos=True)
        return engine.add_request(self.ids, params, self.strategy)

    @property
    def ids(self) -> list[int]:
        rng = Random(self.seed)
        return [rng.choice((*range(5, POISON), *range(POISON + 1, 1000))) for _ in range(self.prompt_tokens)]


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: an innocent, its surroundings, and one to five guests."""
    here = Surroundings(
        family=rng.choice(_FAMILIES),
        block_size=rng.choice((4, 8, 32)),
        max_batched_tokens=rng.choice((8, 16, 64)),
        enable_prefix_caching=rng.random() < 0.5,
    )
    strategies = [strategy for strategy in _STRATEGIES if _runs(here, strategy, place)]
    told = (rng.choice(strategies), rng.choice((1, 6, 20, 40)), rng.choice((2, 6, 12)), rng.randrange(50))
    slabs, host = rng.choice((1, 2, 3, 6, 100)), rng.choice(("0", "64KiB", "256KiB", "4MiB"))
    seats = rng.choice((1, 2, 3, 8))
    guests = [_guest(rng) for _ in range(rng.choice((1, 2, 2, 3, 5)))]
    comes = rng.choice((0, 0, 1, 4))
    innocent, wanted = _clear(here, told, place)

    def run() -> None:
        calls.clear()
        engine, request = _tight(here, innocent, place, slabs=slabs, host=host, max_num_seqs=seats, comes=comes)
        request = _together(engine, innocent, request, guests, comes)
        _compare(request, wanted, "beside others")
        _compare(_finish(engine, innocent.add(engine)), wanted, "afterwards")
        for guest in guests:
            guest.leave(engine)
        try:
            assert_empty(engine)
        except AssertionError as error:
            raise Harm(f"books do not balance: {error}") from error
        raise_refusals(guests)

    return Case(
        told=f"{here}, {innocent} comes at {comes}, {slabs} slabs, host {host}, seats {seats}, guests {guests}", run=run
    )


def _guest(rng: Random) -> Guest:
    trouble, strategy = rng.choice(TROUBLES), repr(rng.choice(_GUESTS))
    if rng.random() < 0.3:
        fault, first, lasting = rng.choice(FAULTS), rng.choice((1, 2, 3, 7, 20)), rng.random() < 0.6
        recent = rng.choice((2, 6))
        strategy = f"Strategy((Faulty(sinks=1, recent={recent}, fault={fault!r}, first={first}, lasting={lasting}),))"
    start, length = rng.randrange(5, 500), rng.choice((1, 3, 10, 30, 60))
    prompt = f"list(range({start}, {start + length}))"
    if rng.random() < 0.12:
        prompt = f"[5, 7, {POISON}, 9]"
    elif rng.random() < 0.15:
        prompt = odd(rng)
    params = {"max_tokens": rng.choice(("1", "4", "12", "30"))}
    for name, kinds in (
        ("temperature", ("0.7", "1e-46", "1e30", "5e-324")),
        ("top_p", ("0.5", "1e-300")),
        ("top_k", ("1", "2000")),
    ):
        if rng.random() < 0.25:
            params[name] = rng.choice(kinds)
    if rng.random() < 0.3:
        params[rng.choice(("stop", "stop_token_ids", "seed", "min_tokens", "max_tokens"))] = odd(rng)
    source = f"SamplingParams({', '.join(f'{name}={text}' for name, text in params.items())})"
    return Guest(
        comes=rng.choice((0, 0, 1, 3, 6)),
        prompt=prompt,
        params=source,
        strategy=strategy,
        trouble=trouble,
        at=rng.choice((1, 2, 5)),
    )


@cache
def _model(family: str) -> LoadedModel:
    return loaded(tiny_model(family, vocab_size=1024))


_refusals: dict[tuple[Surroundings, str], bool] = {}
_answers: dict[tuple[Surroundings, Innocent], list[int] | None] = {}


def _runs(here: Surroundings, strategy: str, place: Workplace) -> bool:
    """Whether a model and its blocks can be managed by a strategy at all."""
    if (here, strategy) not in _refusals:
        try:
            here.engine(place).prepare(Strategy.parse(strategy))
            _refusals[here, strategy] = False
        except (ConfigError, UnsupportedError):
            _refusals[here, strategy] = True
    return not _refusals[here, strategy]


def _clear(here: Surroundings, told: tuple[str, int, int, int], place: Workplace) -> tuple[Innocent, list[int]]:
    """Return an innocent whose tokens lead clearly, so that rounding changes none, with its answer alone."""
    strategy, prompt, output, seed = told
    for turn in range(20):
        innocent = Innocent(strategy=strategy, prompt_tokens=prompt, output_tokens=output, seed=seed + 1000 * turn)
        if (here, innocent) not in _answers:
            _answers[here, innocent] = _alone(here, innocent, place)
        answer = _answers[here, innocent]
        if answer is not None:
            return innocent, answer
    raise AssertionError("no clear answer in 20 tries")


def _alone(here: Surroundings, innocent: Innocent, place: Workplace) -> list[int] | None:
    """Return what an innocent is answered alone, with all the memory it can use; None where a token leads narrowly."""
    leads: list[float] = []

    def looked(logits: torch.Tensor, due: Sequence[Request], end_ids: frozenset[int]) -> list[int | Exception]:
        if len(due):
            best = logits.topk(2, dim=-1).values
            leads.append(float((best[:, 0] - best[:, 1]).min() / logits.std()))
        return sample(logits, due, end_ids)

    engine = here.engine(place, sampler=looked)
    request = _finish(engine, innocent.add(engine))
    if POISON in request.output_ids or min(leads) < CLEAR:
        return None
    assert request.finish_reason is FinishReason.LENGTH, f"alone it ends with {request.finish_reason}: {request.error}"
    return request.output_ids


def _tight(
    here: Surroundings, innocent: Innocent, place: Workplace, *, slabs: int, host: str, comes: int, **options: Any
) -> tuple[Engine, Request | None]:
    """Return an engine that has just room for an innocent, or a little more, which is added if it comes first."""
    slab = here.engine(place).store.arena.slab_bytes
    hosts = [host, "4MiB"] if "offload" in innocent.strategy or innocent.strategy == "infinigen" else [host]
    for memory in (slabs * slab * 2**doubled for doubled in range(12)):
        for host_memory in hosts:
            try:
                engine = here.engine(place, kv_memory=memory, host_memory=host_memory, **options)
                request = innocent.add(engine)
            except CapacityError:
                continue
            if comes:
                engine.cancel(request)
            return engine, None if comes else request
    raise AssertionError("no memory is enough for the innocent")


def _together(engine: Engine, innocent: Innocent, request: Request | None, guests: list[Guest], comes: int) -> Request:
    """Run the innocent and its guests to their ends."""
    for step in range(MOST_STEPS):
        for guest in guests:
            guest.act(engine, step)
        if request is None and step >= comes:
            request = innocent.add(engine)
        if request is not None and request.finish_reason is not None and not engine.has_work and step > 40:
            return request
        _step(engine)
    raise Hang(f"not finished after {MOST_STEPS} steps; the innocent has ended: {request and request.finish_reason}")


def _step(engine: Engine) -> None:
    with suppress(Interrupt):  # whoever pressed Ctrl-C goes on
        engine.step()


def _finish(engine: Engine, request: Request) -> Request:
    for _ in range(MOST_STEPS):
        if request.finish_reason is not None:
            return request
        _step(engine)
    raise Hang(f"the innocent has not ended after {MOST_STEPS} steps")


def _compare(request: Request, wanted: list[int], when: str) -> None:
    if request.finish_reason is not FinishReason.LENGTH:
        raise Harm(f"{when} the innocent ended with {request.finish_reason}: {request.error!r}")
    if request.output_ids != wanted:
        raise Harm(f"{when} the innocent was answered {request.output_ids}, alone {wanted}")


TARGET = Target(name="company", make=make, share=2.0)
