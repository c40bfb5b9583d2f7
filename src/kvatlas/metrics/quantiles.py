"""Intervals of percentiles and of quotients: a tail has few samples, and its interval must say so.

Source: the order-statistic interval of a quantile (Hahn & Meeker 1991, chapter 5), as for the median in `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvatlas.core.errors import ConfigError
from kvatlas.metrics.latency import percentile
from kvatlas.metrics.statistics import LEVEL, Interval, median_interval


def quantile_interval(samples: Sequence[float], rank: float) -> Interval:
    """Return the interval of a percentile between two order statistics: exact, whatever the distribution.

    Where the samples are too few for 95 %, as for the 99th percentile of fewer than 368, the interval ends at the
    smallest or largest, and ``method`` and ``level`` state the coverage that is left.

    Args:
        samples: at least one finite number; independent, or the coverage is too high a claim.
        rank: 0 to 100, ends excluded; 50 gives `median_interval`.

    Raises:
        ConfigError: no sample, one that is not finite, or a rank out of range.
    """
    if not 0 < rank < 100:
        raise ConfigError(f"an interval of percentile {rank} is undefined; want a rank between 0 and 100")
    if rank == 50:
        return median_interval(samples)
    values = sorted(map(float, samples))
    if not values or not all(map(math.isfinite, values)):
        raise ConfigError(f"a percentile wants at least one finite sample, got {values[:4]}")
    below, above, level = _places(len(values), rank / 100)
    estimate = percentile(values, rank)
    if level >= LEVEL:
        method = f"p{rank:.0f}, order statistics, >= 95 %"
    else:
        method = f"p{rank:.0f}, order statistics of {len(values)}, {level:.0%}"
    return Interval(
        low=min(values[below], estimate),
        estimate=estimate,
        high=max(values[above], estimate),
        n=len(values),
        method=method,
        level=level if len(values) > 1 else 0.0,
    )


def quotient_interval(numerator: Interval, denominator: Interval) -> Interval | None:
    """Return numerator / denominator with the widest ends the two intervals allow; None where it is unbounded.

    Conservative for independent samples; it needs no pairs, so repeats that other programs disturbed may differ.
    """
    if numerator.low < 0 or denominator.low <= 0:
        return None
    return Interval(
        low=numerator.low / denominator.high,
        estimate=numerator.estimate / denominator.estimate,
        high=numerator.high / denominator.low,
        n=min(numerator.n, denominator.n),
        method="quotient of the ends of two intervals",
        level=min(numerator.level, denominator.level),
        of_one_run=numerator.of_one_run or denominator.of_one_run,
    )


def _places(n: int, share: float) -> tuple[int, int, float]:
    """Return (index of the lower end, of the upper end, coverage) with at most 2.5 % left outside on each side.

    The quantile lies below the order statistic of index k (from 0) with the probability that at most k samples
    are below it, which is binomial.
    """
    at_most = np.cumsum(_binomial(n, share))
    outside = (1 - LEVEL) / 2
    below = max(0, int(np.searchsorted(at_most, outside, side="right")) - 1)
    above = min(n - 1, int(np.searchsorted(at_most, 1 - outside, side="left")))
    return below, above, max(0.0, float(at_most[above] - at_most[below]))


def _binomial(n: int, share: float) -> NDArray[np.float64]:
    """Return [k]: how likely exactly k of n samples lie below the quantile."""
    log_factorial = np.concatenate([np.zeros(1), np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    logs = log_factorial[n] - log_factorial[k] - log_factorial[n - k] + k * math.log(share)
    return np.asarray(np.exp(logs + (n - k) * math.log(1 - share)))
