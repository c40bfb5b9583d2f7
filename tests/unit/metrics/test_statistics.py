from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kvatlas.core.errors import ConfigError
from kvatlas.metrics.statistics import (
    Interval,
    bootstrap_interval,
    median_interval,
    paired_difference_interval,
    wilson_interval,
    winners,
)


def interval(low, estimate, high, **changes):
    return Interval(low=low, estimate=estimate, high=high, n=9, **changes)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_matches_published_values(successes, n, low, high):
    found = wilson_interval(successes, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert (found.estimate, found.n) == (successes / n, n)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(successes, n):
    with pytest.raises(ConfigError):
        wilson_interval(successes, n)


@pytest.mark.parametrize(
    ("n", "low", "high", "level"),
    [
        (6, 1, 6, 0.96875),
        (9, 2, 8, 0.9609375),
        (10, 2, 9, 0.978515625),
        (20, 6, 15, 0.9586105),
        (25, 8, 18, 0.9567147),
    ],
)
def test_the_median_lies_between_tabled_order_statistics(n, low, high, level):
    found = median_interval(list(range(n, 0, -1)))
    assert (found.low, found.high) == (low, high)
    assert found.level == pytest.approx(level, abs=1e-6)
    assert found.estimate == (n + 1) / 2


@pytest.mark.parametrize(("n", "level"), [(1, 0.0), (2, 0.5), (3, 0.75), (5, 0.9375)])
def test_few_samples_fall_back_to_the_extremes_and_say_so(n, level):
    found = median_interval(list(range(n)))
    assert (found.low, found.high) == (0, n - 1)
    assert found.level == pytest.approx(level)
    assert f"smallest and largest of {n}, {level:.0%}" in found.method


def test_many_samples_are_quick_and_close_to_normal():
    found = median_interval(list(range(100_001)))
    assert found.low == pytest.approx(50_000 - 1.96 * 100_000**0.5 / 2, abs=2)


def coverage(make, truth, repeats=400):
    rng = np.random.default_rng(0)
    return sum(make(rng).contains(truth) for _ in range(repeats)) / repeats


def test_coverage_of_the_median():
    skewed = coverage(lambda rng: median_interval(rng.exponential(size=15).tolist()), np.log(2))
    assert skewed >= 0.94


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_coverage_of_wilson(share):
    assert coverage(lambda rng: wilson_interval(int(rng.binomial(40, share)), 40), share) >= 0.92


def test_coverage_of_paired_proportions():
    def make(rng):
        a = rng.random(60) < 0.8
        return paired_difference_interval(a.tolist(), (a & (rng.random(60) < 0.9)).tolist())

    assert coverage(make, 0.08) >= 0.93


def test_coverage_of_the_bootstrap():
    def make(rng):
        return bootstrap_interval(rng.normal(3.0, 1.0, size=30).tolist(), fmean, seed=1, resamples=200)

    assert coverage(make, 3.0, repeats=150) >= 0.88


def test_the_bootstrap_repeats_itself():
    samples = [1.37**n for n in range(20)]
    found = bootstrap_interval(samples, fmean, seed=3)
    assert found == bootstrap_interval(samples, fmean, seed=3)
    assert found != bootstrap_interval(samples, fmean, seed=4)
    assert found.low < found.estimate == fmean(samples) < found.high
    assert bootstrap_interval([2.0], fmean, seed=0).level == 0.0


def test_pairs_remove_what_both_share():
    noise = [10.0, 200.0, 30.0, 4000.0, 50.0, 600.0, 7.0]
    found = paired_difference_interval([x + 1 for x in noise], noise)
    assert (found.low, found.estimate, found.high, found.n) == (1.0, 1.0, 1.0, 7)
    assert not found.contains(0.0)


def test_paired_answers_give_a_difference_of_proportions():
    a, b = [1] * 40 + [0] * 10, [1] * 35 + [0] * 5 + [0] * 8 + [1] * 2
    found = paired_difference_interval(a, b)
    assert found.estimate == pytest.approx(3 / 50)
    # Agresti-Min by hand: (5.5 - 2.5) / 52 -+ 1.96 * sqrt(8 - 9 / 52) / 52
    assert (found.low, found.high) == (pytest.approx(-0.04776, abs=1e-4), pytest.approx(0.16314, abs=1e-4))


def test_equal_answers_are_no_proof_of_equality():
    found = paired_difference_interval([1, 0, 1], [1, 0, 1])
    assert found.low < -0.3 and found.high > 0.3


def test_unequal_pairs_are_refused():
    with pytest.raises(ConfigError, match="match them by index"):
        paired_difference_interval([1.0], [1.0, 2.0])


@pytest.mark.parametrize("samples", [[], [float("nan")], [1.0, float("inf")]])
def test_bad_samples_are_refused(samples):
    with pytest.raises(ConfigError, match="finite sample"):
        median_interval(samples)


@pytest.mark.parametrize("ends", [(2, 1, 3), (0, 4, 3), (0, float("nan"), 1), (0, 1, float("inf"))])
def test_an_interval_is_in_order(ends):
    with pytest.raises(ConfigError, match="low <= estimate <= high"):
        interval(*ends)


def test_overlap_includes_the_ends():
    assert interval(0, 1, 2).overlaps(interval(2, 3, 4))
    assert not interval(0, 1, 2).overlaps(interval(2.1, 3, 4))


def test_the_winner_stands_alone_or_ties():
    candidates = {"slow": interval(5, 6, 7), "fast": interval(1, 2, 3), "quick": interval(2.5, 2.8, 4)}
    assert winners(candidates, higher_is_better=False).names == ("fast", "quick")
    assert winners(candidates, higher_is_better=False).tie
    best = winners(candidates, higher_is_better=True)
    assert (best.names, best.tie) == (("slow",), False)


def test_a_verdict_from_few_samples_is_a_hint():
    candidates = {"a": interval(1, 1, 1, level=0.0), "b": interval(2, 2, 2)}
    assert winners(candidates, higher_is_better=True).level == 0.0


def test_nobody_wins_without_candidates():
    with pytest.raises(ConfigError, match="no candidates"):
        winners({}, higher_is_better=True)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_median_interval_holds_the_median(samples):
    found = median_interval(samples)
    assert min(samples) <= found.low <= found.estimate <= found.high <= max(samples)


@given(st.integers(0, 50), st.integers(1, 50))
def test_a_wilson_interval_stays_in_range(successes, n):
    found = wilson_interval(min(successes, n), n)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
