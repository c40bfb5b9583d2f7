"""Intervals instead of bare averages, and a verdict that can be "tie".

Every interval states its method and the coverage it really has, so three repeats are not mistaken for proof.
Sources: Wilson 1927; the order-statistic interval of a quantile (Hahn & Meeker 1991, chapter 5);
Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, median

import numpy as np
from numpy.typing import NDArray

from kvatlas.core.errors import ConfigError

LEVEL = 0.95
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval.

    Args:
        low: lower end.
        estimate: best single number, low <= estimate <= high.
        high: upper end.
        n: number of samples.
        method: how it was made, in words for a caption.
        level: the coverage the method claims here, 0 to 1; below 0.95 where samples are too few.
        of_one_run: "requests" or "steps" where all samples are of a single run: they depend on each other, so the
            ends show a spread and decide nothing; "" where samples are independent.

    Raises:
        ConfigError: an end is not finite or out of order.
    """

    low: float
    estimate: float
    high: float
    n: int
    method: str = "given"
    level: float = LEVEL
    of_one_run: str = ""

    def __post_init__(self) -> None:
        if not (self.low <= self.estimate <= self.high and math.isfinite(self.high - self.low)):
            raise ConfigError(f"an interval wants finite low <= estimate <= high, got {self!r}")

    def overlaps(self, other: Interval) -> bool:
        """Whether the two share a point, ends included."""
        return self.low <= other.high and other.low <= self.high

    def contains(self, value: float) -> bool:
        """Whether the value lies inside, ends included; a difference whose interval contains 0 is a tie."""
        return self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Winner:
    """Who is best.

    Args:
        names: the best and all that cannot be told from it, best estimate first.
        tie: whether there is more than one.
        level: lowest coverage among the intervals compared; below 0.95 the verdict is a hint.
    """

    names: tuple[str, ...]
    tie: bool
    level: float


def wilson_interval(successes: int, n: int) -> Interval:
    """Return the 95 % Wilson score interval of a proportion; well behaved at 0 and n successes."""
    if n < 1 or not 0 <= successes <= n:
        raise ConfigError(f"a proportion wants 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share, z2 = successes / n, _Z**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = min(share, max(0.0, center - half)), max(share, min(1.0, center + half))
    return Interval(low=low, estimate=share, high=high, n=n, method="Wilson 95 %")


def median_interval(samples: Sequence[float]) -> Interval:
    """Return the interval of the median between two order statistics: exact, whatever the distribution.

    The pair is the closest with a coverage of at least 95 %. Fewer than six samples allow none; then the
    smallest and largest are returned, and ``method`` and ``level`` say so (one sample: level 0).
    """
    values = sorted(_finite(samples))
    n = len(values)
    outside = _outside(n)
    skipped = max(0, int(np.searchsorted(outside, 1 - LEVEL, side="right")) - 1)
    level = max(0.0, 1 - float(outside[skipped]))
    if level >= LEVEL:
        method = "median, order statistics, >= 95 %"
    else:
        method = f"median, smallest and largest of {n}, {level:.0%}"
    low, high = values[skipped], values[n - 1 - skipped]
    return Interval(low=low, estimate=median(values), high=high, n=n, method=method, level=level)


def bootstrap_interval(
    samples: Sequence[float], statistic: Callable[[Sequence[float]], float], seed: int, resamples: int = 2000
) -> Interval:
    """Return the 95 % percentile-bootstrap interval of any statistic; too narrow below about 20 samples.

    Args:
        samples: independent measurements.
        statistic: function of a sequence of the same length.
        seed: makes the result repeatable.
        resamples: number of draws with replacement.
    """
    values = np.asarray(_finite(samples))
    rng = np.random.default_rng(seed)
    draws = [float(statistic(rng.choice(values, size=len(values)).tolist())) for _ in range(resamples)]
    low, high = (float(end) for end in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    estimate = float(statistic(values.tolist()))
    low, high = min(low, estimate), max(high, estimate)
    method = f"percentile bootstrap 95 %, {resamples} resamples"
    level = LEVEL if len(values) > 1 else 0.0
    return Interval(low=low, estimate=estimate, high=high, n=len(values), method=method, level=level)


def paired_difference_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return an interval of a - b, where ``a[i]`` and ``b[i]`` are the same prompt or repeat.

    Samples that are all 0 or 1 (wrong or right) give the difference of the two proportions (Agresti-Min);
    others the median of the differences (`median_interval`). For a mean, bootstrap the differences.
    """
    if len(a) != len(b):
        raise ConfigError(f"pairs want equally many samples, got {len(a)} and {len(b)}; match them by index")
    first, second = _finite(a), _finite(b)
    if set(first) | set(second) <= {0.0, 1.0}:
        return _proportion_difference(first, second)
    found = median_interval([x - y for x, y in zip(first, second, strict=True)])
    return replace(found, method=f"paired difference, {found.method}")


def winners(candidates: Mapping[str, Interval], higher_is_better: bool) -> Winner:
    """Return the candidate with the best estimate and all whose interval overlaps its own: they tie.

    Args:
        candidates: name -> interval of the same metric.
        higher_is_better: False for latencies and bytes.
    """
    if not candidates:
        raise ConfigError("no candidates to compare; pass at least one interval")
    sign = -1 if higher_is_better else 1
    ranked = sorted(candidates, key=lambda name: sign * candidates[name].estimate)
    best = candidates[ranked[0]]
    names = tuple(name for name in ranked if candidates[name].overlaps(best))
    return Winner(names=names, tie=len(names) > 1, level=min(interval.level for interval in candidates.values()))


def _outside(n: int) -> NDArray[np.float64]:
    """Return [k]: how likely the median lies outside what is left after skipping k samples at both ends."""
    log_factorial = np.concatenate([np.zeros(1), np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange((n + 1) // 2)
    log_probability = log_factorial[n] - log_factorial[k] - log_factorial[n - k] - n * math.log(2)
    return 2 * np.cumsum(np.exp(log_probability))


def _finite(samples: Sequence[float]) -> list[float]:
    values = [float(value) for value in samples]
    if not values or not all(map(math.isfinite, values)):
        raise ConfigError(f"an interval wants at least one finite sample, got {values[:4]}")
    return values


def _proportion_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Agresti & Min: Wald's interval after adding half a pair to each of the four outcomes."""
    n = len(a)
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(y > x for x, y in zip(a, b, strict=True))
    plus_a, plus_b, total = only_a + 0.5, only_b + 0.5, n + 2
    center = (plus_a - plus_b) / total
    half = _Z * math.sqrt(plus_a + plus_b - (plus_a - plus_b) ** 2 / total) / total
    estimate = (only_a - only_b) / n
    low, high = min(estimate, max(-1.0, center - half)), max(estimate, min(1.0, center + half))
    return Interval(low=low, estimate=estimate, high=high, n=n, method="paired proportions, Agresti-Min 95 %")
