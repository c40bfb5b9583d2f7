import math

import numpy as np
import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.workloads.arrivals import gamma_arrivals, poisson_arrivals


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0, math.inf])
def test_the_last_request_arrives_at_n_over_rate(burstiness):
    times = gamma_arrivals(200, 4.0, burstiness, seed=0)
    assert len(times) == 200 and times == sorted(times) and times[0] > 0
    assert times[-1] == pytest.approx(50.0)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_the_variation_of_the_gaps_follows_the_burstiness(burstiness):
    gaps = np.diff(gamma_arrivals(20_000, 1.0, burstiness, seed=1))
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_infinite_burstiness_is_evenly_spaced():
    assert gamma_arrivals(4, 2.0, math.inf, seed=0) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_an_infinite_rate_sends_all_at_once():
    assert gamma_arrivals(3, math.inf, 1.0, seed=0) == [0.0, 0.0, 0.0]


def test_poisson_is_burstiness_one_and_repeats_itself():
    assert poisson_arrivals(9, 2.0, seed=3) == gamma_arrivals(9, 2.0, 1.0, seed=3)
    assert poisson_arrivals(9, 2.0, seed=3) != poisson_arrivals(9, 2.0, seed=4)


def test_extreme_bursts_stay_finite():
    assert all(map(math.isfinite, gamma_arrivals(50, 1.0, 1e-4, seed=0)))


@pytest.mark.parametrize(
    "arguments", [(0, 1.0, 1.0, 0), (1, 0.0, 1.0, 0), (1, 1.0, 0.0, 0), (1, math.nan, 1.0, 0), (1, 1.0, 1.0, -1)]
)
def test_impossible_arrivals_are_refused(arguments):
    with pytest.raises(ConfigError, match="arrivals want"):
        gamma_arrivals(*arguments)
