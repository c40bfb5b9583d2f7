"""Drive an engine with requests, at once or as they arrive, and watch its memory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvatlas.core.errors import CapacityError
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.metrics.latency import RequestTimes


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request to come: ``at_s`` seconds after the start."""

    at_s: float
    prompt_ids: list[int]
    output_tokens: int


@dataclass(kw_only=True)
class Observation:
    """What a run showed.

    Args:
        requests: in order of arrival.
        refused: why requests could not be taken, one line each.
        wall_s: from start to the last token.
        cpu_s: CPU time of this process in between.
        decode_s: time of the steps that did nothing but decode.
        decode_tokens: tokens that those steps produced.
        peak_used_bytes: most live bytes on the device, sidecars included, cached prefixes left out.
        peak_host_bytes: most live bytes on the host.
        peak_running: most requests that held memory at once.
        swaps: how often a cache was moved to the host instead of being dropped.
        moved: whether anything was moved between the tiers.
    """

    requests: list[Request] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0
    peak_used_bytes: int = 0
    peak_host_bytes: int = 0
    peak_running: int = 0
    swaps: int = 0
    moved: bool = False

    @property
    def preemptions(self) -> int:
        """How often a cache was taken away."""
        return sum(request.num_preemptions for request in self.requests)

    @property
    def times(self) -> list[RequestTimes]:
        """When requests arrived and their tokens came."""
        return [
            RequestTimes(
                arrival_s=request.arrival_s,
                token_times_s=tuple(request.token_times_s),
                prompt_tokens=request.output_start,
            )
            for request in self.requests
        ]

    @property
    def decode_throughput(self) -> float | None:
        """Tokens per second of the steps that did nothing but decode; None if there was none."""
        return self.decode_tokens / self.decode_s if self.decode_tokens and self.decode_s > 0 else None

    def want_all(self) -> None:
        """Raise CapacityError if a request was refused."""
        if self.refused:
            asked = len(self.requests) + len(self.refused)
            raise CapacityError(f"{len(self.refused)} of {asked} requests can never fit: {self.refused[0]}")


def random_prompt(rng: random.Random, vocabulary: int, num_tokens: int) -> list[int]:
    """Return token ids below ``vocabulary``, drawn evenly."""
    return [rng.randrange(vocabulary) for _ in range(num_tokens)]


def drive(engine: Engine, arrivals: Sequence[Arrival], strategy: str) -> Observation:
    """Run all requests in real time and return what was seen; a request that can never fit is noted, not run."""
    seen = Observation()
    cpu, start = time.process_time(), engine.clock()
    coming = sorted(arrivals, key=lambda arrival: arrival.at_s, reverse=True)
    while coming or engine.has_work:
        while coming and start + coming[-1].at_s <= engine.clock():
            add(engine, coming.pop(), start, strategy, seen)
        if engine.has_work:
            step(engine, seen)
        elif coming:
            time.sleep(max(0.0, start + coming[-1].at_s - engine.clock()))
    seen.wall_s, seen.cpu_s = engine.clock() - start, time.process_time() - cpu
    seen.peak_used_bytes, seen.peak_host_bytes = engine.peak_used_bytes, engine.peak_host_bytes
    seen.peak_running, seen.swaps = engine.peak_running, engine.scheduler.num_swaps
    seen.moved = bool(engine.link.to_host.moves or engine.link.to_device.moves)
    return seen


def add(engine: Engine, arrival: Arrival, start: float, strategy: str, seen: Observation) -> None:
    """Queue a request that arrived ``arrival.at_s`` after ``start``, or note why it is refused."""
    params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
    try:
        seen.requests.append(engine.add_request(arrival.prompt_ids, params, strategy, arrival_s=start + arrival.at_s))
    except CapacityError as error:
        seen.refused.append(str(error))


def step(engine: Engine, seen: Observation) -> None:
    """Run one step; count it as decoding if no prompt was in progress and no request was let in."""
    scheduler = engine.scheduler
    in_prompt = any(request.prefill_end is not None for request in scheduler.running)
    next_in = scheduler.waiting[0] if scheduler.waiting else None
    start = engine.clock()
    produced = len(engine.step())
    if not in_prompt and (next_in is None or next_in in scheduler.waiting):
        seen.decode_s += engine.clock() - start
        seen.decode_tokens += produced
