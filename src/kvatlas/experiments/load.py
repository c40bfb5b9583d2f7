"""Drive an engine with requests, at once or as they arrive, and watch its memory."""

from __future__ import annotations

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
        peak_used_bytes: most live bytes, sidecars included, cached prefixes left out.
        peak_running: most requests that held memory at once.
    """

    requests: list[Request] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_used_bytes: int = 0
    peak_running: int = 0

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


def drive(engine: Engine, arrivals: Sequence[Arrival], strategy: str) -> Observation:
    """Run all requests in real time and return what was seen; a request that can never fit is noted, not run."""
    seen = Observation()
    cpu, start = time.process_time(), engine.clock()
    coming = sorted(arrivals, key=lambda arrival: arrival.at_s, reverse=True)
    while coming or engine.has_work:
        while coming and start + coming[-1].at_s <= engine.clock():
            _add(engine, coming.pop(), start, strategy, seen)
        if engine.has_work:
            engine.step()
        elif coming:
            time.sleep(max(0.0, start + coming[-1].at_s - engine.clock()))
    seen.peak_used_bytes, seen.peak_running = engine.peak_used_bytes, engine.peak_running
    seen.wall_s, seen.cpu_s = engine.clock() - start, time.process_time() - cpu
    return seen


def _add(engine: Engine, arrival: Arrival, start: float, strategy: str, seen: Observation) -> None:
    params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
    try:
        seen.requests.append(engine.add_request(arrival.prompt_ids, params, strategy, arrival_s=start + arrival.at_s))
    except CapacityError as error:
        seen.refused.append(str(error))
