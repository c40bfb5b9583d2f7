"""Arrival times as vLLM's ``bench serve`` draws them: random gaps, rescaled to a fixed total.

Gaps ~ Gamma(shape=burstiness, scale=1 / (rate * burstiness)); the cumulated gaps are then rescaled so that
the last of n requests arrives at n / rate. So the mean rate is the one asked for, in every run.
"""

from __future__ import annotations

import math

import numpy as np

from kvatlas.core.errors import ConfigError


def gamma_arrivals(num_requests: int, rate_per_s: float, burstiness: float, seed: int) -> list[float]:
    """Return sorted arrival times, seconds; the first request waits one gap, the last arrives at n / rate.

    Args:
        num_requests: how many, at least 1.
        rate_per_s: mean request rate, above 0; ``math.inf`` lets all arrive at time 0.
        burstiness: 1 is Poisson, below 1 comes in bursts, above 1 is steadier, ``math.inf`` is evenly spaced.
        seed: makes the result repeatable, >= 0.

    Raises:
        ConfigError: a number is out of range.
    """
    if num_requests < 1 or seed < 0:
        raise ConfigError(f"arrivals want at least 1 request and a seed >= 0, got {num_requests} and {seed}")
    if not rate_per_s > 0 or not burstiness > 0:
        raise ConfigError(f"arrivals want rate and burstiness above 0, got {rate_per_s} and {burstiness}")
    if math.isinf(rate_per_s):
        return [0.0] * num_requests
    if math.isinf(burstiness):
        gaps = np.full(num_requests, 1 / rate_per_s)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate_per_s * burstiness), num_requests)
    times = np.cumsum(gaps)
    if times[-1] > 0:
        times *= num_requests / rate_per_s / times[-1]
    arrivals: list[float] = times.tolist()
    return arrivals


def poisson_arrivals(num_requests: int, rate_per_s: float, seed: int) -> list[float]:
    """Return arrival times, seconds, of a Poisson process: `gamma_arrivals` with burstiness 1."""
    return gamma_arrivals(num_requests, rate_per_s, 1.0, seed)
