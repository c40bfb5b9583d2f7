import random

import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.metrics.quantiles import quantile_interval, quotient_interval
from kvatlas.metrics.statistics import Interval, median_interval


def test_the_median_has_its_own_interval():
    samples = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0]
    assert quantile_interval(samples, 50) == median_interval(samples)


@pytest.mark.parametrize("rank", [10, 90, 99])
def test_enough_samples_cover_the_quantile_as_often_as_promised(rank):
    rng, held, runs = random.Random(0), 0, 400
    for _ in range(runs):
        found = quantile_interval([rng.random() for _ in range(400)], rank)
        assert found.level >= 0.95 and found.method.endswith(">= 95 %")
        held += found.contains(rank / 100)
    assert held / runs > 0.93


def test_too_few_samples_for_a_tail_say_how_much_is_covered():
    found = quantile_interval([float(value) for value in range(64)], 99)
    assert found.high == 63.0
    assert found.level == pytest.approx(1 - 0.99**64, abs=0.01)
    assert "of 64" in found.method


def test_one_sample_covers_nothing():
    found = quantile_interval([2.0], 90)
    assert (found.low, found.estimate, found.high, found.level) == (2, 2, 2, 0)


@pytest.mark.parametrize(("samples", "rank"), [([], 90), ([1.0], 0), ([1.0], 100), ([float("nan")], 90)])
def test_what_has_no_percentile_is_refused(samples, rank):
    with pytest.raises(ConfigError):
        quantile_interval(samples, rank)


def test_a_quotient_takes_the_ends_that_are_farthest_apart():
    top = Interval(low=8, estimate=10, high=12, n=6, level=0.97)
    bottom = Interval(low=2, estimate=2.5, high=4, n=3, level=0.75)
    found = quotient_interval(top, bottom)
    assert (found.low, found.estimate, found.high, found.n, found.level) == (2, 4, 6, 3, 0.75)


def test_a_quotient_by_what_may_be_zero_has_no_bound():
    one = Interval(low=1, estimate=1, high=1, n=2)
    assert quotient_interval(one, Interval(low=0, estimate=1, high=2, n=2)) is None
