"""What comparisons share that take turns: the order of a round, and what its pairs say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean
from typing import TypeVar

import numpy as np

from kvatlas.metrics.statistics import Interval, median_interval

T = TypeVar("T")
T_975 = {15: 2.145, 20: 2.093, 30: 2.045}
"""Student's t at 97.5 % for so many rounds."""


def turned(forms: Sequence[T], number: int) -> list[T]:
    """Return the order of a round: each is first in its turn, so that two go A B, B A, A B."""
    first = number % len(forms)
    return [*forms[first:], *forms[:first]]


def mean_ratio(new: Sequence[float], old: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean of the ratios of as many pairs as ``T_975`` knows, and its 95 % interval."""
    logs = np.log(np.array(new) / np.array(old))
    half = T_975[len(logs)] * logs.std(ddof=1) / math.sqrt(len(logs))
    mean, low, high = (math.exp(logs.mean() + shift) for shift in (0, -half, half))
    return mean, low, high


def median_ratio(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Return the median of the ratios of pairs, which a pair that was disturbed hardly moves, and its interval."""
    return median_interval([a / b for a, b in zip(new, old, strict=True)])


def mean_of_cells(ratios: Sequence[Sequence[float]]) -> Interval:
    """Return the median over pairs of the geometric mean over cells, of each cell's ratios pair by pair.

    Pairs that not all cells have are left out.
    """
    return median_interval([geometric_mean(pair) for pair in zip(*ratios, strict=False)])
