import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.metrics.latency import (
    RequestTimes,
    Slo,
    duration_s,
    goodput,
    output_throughput,
    percentile,
    percentiles,
    request_throughput,
    slo_attainment,
    total_throughput,
)


def request(arrival_s, *token_times_s, prompt_tokens=10):
    return RequestTimes(arrival_s=arrival_s, token_times_s=token_times_s, prompt_tokens=prompt_tokens)


THREE = request(1.0, 1.5, 1.75, 2.5)
ONE = request(2.0, 2.25)


def test_latencies_of_three_tokens():
    assert (THREE.first_token_s, THREE.ttft_s, THREE.e2e_s, THREE.output_tokens) == (1.5, 0.5, 1.5, 3)
    assert THREE.itl_s == [0.25, 0.75]
    assert THREE.tpot_s == 0.5


def test_one_token_has_no_tpot():
    assert (ONE.ttft_s, ONE.e2e_s, ONE.tpot_s, ONE.itl_s) == (0.25, 0.25, None, [])


def test_a_chunk_with_two_tokens_is_not_two_gaps():
    chunked = request(0.0, 1.0, 1.0, 2.0, 2.0, 2.0)
    assert chunked.itl_s == [1.0]
    assert chunked.tpot_s == 0.25


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), (1.0, 2.0, 1.5), (1.0, float("nan")), (float("inf"), 2.0)])
def test_impossible_times_are_refused(times):
    with pytest.raises(ConfigError):
        request(*times)


def test_goodput_counts_requests_that_meet_every_limit():
    requests = [THREE, ONE]
    assert goodput(requests, Slo(ttft_s=0.5), 4.0) == 0.5
    assert goodput(requests, Slo(ttft_s=0.5, e2e_s=1.0), 4.0) == 0.25
    assert goodput(requests, Slo(ttft_s=0.1), 4.0) == 0.0
    assert slo_attainment(requests, Slo(ttft_s=0.3)) == 0.5


def test_one_token_meets_any_tpot():
    assert Slo(tpot_s=0.001).is_met_by(ONE)
    assert not Slo(tpot_s=0.499).is_met_by(THREE)
    assert Slo(tpot_s=0.5).is_met_by(THREE)


def test_an_slo_prints_itself():
    assert str(Slo(ttft_s=1, tpot_s=0.1)) == "TTFT <= 1000 ms, TPOT <= 100 ms"


@pytest.mark.parametrize("limits", [{}, {"ttft_s": 0.0}, {"e2e_s": -1.0, "ttft_s": 1.0}, {"ttft_s": float("nan")}])
def test_an_slo_without_a_limit_is_refused(limits):
    with pytest.raises(ConfigError, match="at least one limit"):
        Slo(**limits)


def test_throughput():
    requests = [THREE, ONE]
    assert duration_s(requests) == 1.5
    assert duration_s([]) == 0.0
    assert request_throughput(requests, 2.0) == 1.0
    assert output_throughput(requests, 2.0) == 2.0
    assert total_throughput(requests, 2.0) == 12.0
    assert goodput([], Slo(ttft_s=1), 2.0) == 0.0


@pytest.mark.parametrize("rate", [request_throughput, output_throughput, total_throughput])
def test_a_rate_needs_a_duration(rate):
    with pytest.raises(ConfigError, match="above 0 s"):
        rate([ONE], 0.0)


def test_no_requests_have_no_attainment():
    with pytest.raises(ConfigError, match="undefined"):
        slo_attainment([], Slo(ttft_s=1))


def test_percentiles_interpolate_linearly():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentiles([5.0]) == {50: 5.0, 90: 5.0, 95: 5.0, 99: 5.0}


@pytest.mark.parametrize(("samples", "rank"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_an_undefined_percentile_is_refused(samples, rank):
    with pytest.raises(ConfigError, match="undefined"):
        percentile(samples, rank)
