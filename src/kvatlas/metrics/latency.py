"""TTFT, ITL, TPOT, end-to-end latency, goodput and throughput from timestamps of one clock, in seconds.

One definition each, those of vLLM's and SGLang's ``bench serve``; TTFT starts at the request's arrival, so
queueing is in it, wherever the queue is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvatlas.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """When one finished request arrived and when each of its output tokens was there.

    Args:
        arrival_s: when the request came in, before any queueing.
        token_times_s: one entry per output token, at least one; tokens of one chunk have equal times.
        prompt_tokens: length of the prompt, tokens; only total throughput reads it.

    Raises:
        ConfigError: no token, times that go back, or a token before the arrival. A request without tokens has
            failed: leave it out and report it apart; it earns no goodput.
    """

    arrival_s: float
    token_times_s: tuple[float, ...]
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        times = (self.arrival_s, *self.token_times_s)
        if len(times) < 2 or not all(map(math.isfinite, times)):
            raise ConfigError(f"a request needs finite times and at least one output token, got {times[:4]}")
        for earlier, later in pairwise(times):
            if later < earlier:
                raise ConfigError(f"token times must not go back: {later} s follows {earlier} s")

    @property
    def output_tokens(self) -> int:
        """Number of output tokens."""
        return len(self.token_times_s)

    @property
    def first_token_s(self) -> float:
        """When the first output token was there."""
        return self.token_times_s[0]

    @property
    def ttft_s(self) -> float:
        """Time to first token: from arrival, queueing included."""
        return self.first_token_s - self.arrival_s

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: each gap between tokens; those that came in one chunk have no gap."""
        times = self.token_times_s
        return [later - earlier for earlier, later in pairwise(times) if later > earlier]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, (E2E - TTFT) / (output tokens - 1); None for one token."""
        if self.output_tokens == 1:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: from arrival to the last token."""
        return self.token_times_s[-1] - self.arrival_s


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a request must meet to be good: every limit that is given, inclusive.

    Args:
        ttft_s: highest TTFT, or None.
        tpot_s: highest TPOT, or None; a request of one token meets any, as in vLLM.
        e2e_s: highest end-to-end latency, or None.

    Raises:
        ConfigError: no limit is given, or one is not positive.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.ttft_s, self.tpot_s, self.e2e_s) if limit is not None]
        if not limits or not all(limit > 0 for limit in limits):
            raise ConfigError(f"an SLO needs at least one limit, and limits above 0 s; got {self!r}")

    def __str__(self) -> str:
        """Return ``"TTFT <= 1000 ms, TPOT <= 100 ms"``, to be printed beside every goodput."""
        limits = {"TTFT": self.ttft_s, "TPOT": self.tpot_s, "E2E": self.e2e_s}
        return ", ".join(f"{name} <= {limit * 1e3:g} ms" for name, limit in limits.items() if limit is not None)

    def is_met_by(self, request: RequestTimes) -> bool:
        """Whether the request meets every limit."""
        measured = (request.ttft_s, request.tpot_s or 0.0, request.e2e_s)
        limits = (self.ttft_s, self.tpot_s, self.e2e_s)
        return all(limit is None or value <= limit for value, limit in zip(measured, limits, strict=True))


def duration_s(requests: Sequence[RequestTimes]) -> float:
    """Return the time from the first arrival to the last token, seconds; 0 without requests."""
    if not requests:
        return 0.0
    return max(r.token_times_s[-1] for r in requests) - min(r.arrival_s for r in requests)


def goodput(requests: Sequence[RequestTimes], slo: Slo, duration_s: float) -> float:
    """Return requests per second that meet *every* limit of the SLO.

    Args:
        requests: the finished requests.
        slo: the limits; print them beside the result.
        duration_s: length of the whole measurement, seconds, failed requests included.
    """
    return sum(map(slo.is_met_by, requests)) / _positive(duration_s)


def slo_attainment(requests: Sequence[RequestTimes], slo: Slo) -> float:
    """Return the fraction of the finished requests, in [0, 1], that meet every limit."""
    if not requests:
        raise ConfigError("the SLO attainment of no requests is undefined; check that any finished")
    return sum(map(slo.is_met_by, requests)) / len(requests)


def request_throughput(requests: Sequence[RequestTimes], duration_s: float) -> float:
    """Return finished requests per second."""
    return len(requests) / _positive(duration_s)


def output_throughput(requests: Sequence[RequestTimes], duration_s: float) -> float:
    """Return output tokens per second, over all requests."""
    return sum(request.output_tokens for request in requests) / _positive(duration_s)


def total_throughput(requests: Sequence[RequestTimes], duration_s: float) -> float:
    """Return prompt plus output tokens per second, over all requests."""
    return sum(request.prompt_tokens + request.output_tokens for request in requests) / _positive(duration_s)


def percentile(samples: Sequence[float], rank: float) -> float:
    """Return a percentile by linear interpolation between order statistics: numpy's default, as in vLLM.

    Args:
        samples: at least one number. Pool ITLs over all requests; leave out the TPOT of one-token requests.
        rank: 0 to 100; 50 is the median.
    """
    if not samples or not 0 <= rank <= 100:
        raise ConfigError(f"percentile {rank} of {len(samples)} samples is undefined; want 0-100 and a sample")
    return float(np.percentile(samples, rank, method="linear"))


def percentiles(samples: Sequence[float], ranks: Sequence[float] = (50, 90, 95, 99)) -> dict[float, float]:
    """Return rank -> percentile, by `percentile`."""
    return {rank: percentile(samples, rank) for rank in ranks}


def _positive(duration_s: float) -> float:
    if not duration_s > 0:
        raise ConfigError(f"a rate needs a duration above 0 s, got {duration_s}")
    return duration_s
