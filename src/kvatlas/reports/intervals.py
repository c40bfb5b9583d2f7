"""One interval per mark, over what is independent: requests and steps of one run are not.

Requests of a run wait for each other, and whatever disturbs a run disturbs all its steps. So where a metric has a
sample per request or step, each run gives one number, its median or percentile, and the interval is over runs. A
single run keeps the spread of its samples, and claims no coverage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvatlas.metrics.quantiles import quantile_interval
from kvatlas.metrics.statistics import Interval, median_interval, paired_difference_interval, wilson_interval
from kvatlas.records.schema import Params
from kvatlas.reports.quantities import SHARES, percentile_of

SampleId = tuple[int, int]
Samples = Mapping[SampleId, float]

LATENCIES = frozenset({"ttft", "tpot", "e2e", "itl"})
_OF_A_STEP = frozenset(
    {
        *("step_time", "attend_time", "speculate_time", "wait_time", "other_time"),
        *("fetch_time", "store_time", "transfer_time"),
        *("hidden_share", "transfer_to_compute", "bound_reached"),
    }
)
# What a sample is of, where a run has many.
_POOLED = {
    "request_latency": ("requests", LATENCIES),
    "request_rate": ("requests", LATENCIES),
    "trace_replay": ("requests", LATENCIES),
    "model_size": ("requests", LATENCIES),
    "offload_breakdown": ("steps", _OF_A_STEP),
}
# The param that says how many requests a repeat has; its samples are numbered repeat by repeat.
_PER_REPEAT = {"request_latency": "concurrency", "model_size": "batch"}
# Where no param says it: a metric with one sample per repeat.
COUNTED_BY = {"offload_breakdown": "device_peak"}


def pooled(experiment: str, metric: str) -> str:
    """Return what the samples of a metric are of, "requests" or "steps"; "" where each is of a run of its own."""
    kind, metrics = _POOLED.get(experiment, ("", frozenset()))
    tail = percentile_of(metric)
    return kind if (tail[0] if tail else metric) in metrics else ""


def split_runs(experiment: str, samples: Samples, params: Params, counted: Samples) -> list[list[float]]:
    """Return the samples of each run; those of another seed are of another run.

    Args:
        experiment: its name.
        samples: (seed, index) -> value.
        params: of the point, as far as known.
        counted: samples of the metric that has one per repeat, where there is such.
    """
    found: dict[tuple[int, int], list[float]] = {}
    totals: dict[int, int] = {}
    for seed, index in samples:
        totals[seed] = max(totals.get(seed, 0), index + 1)
    told = params.get(_PER_REPEAT.get(experiment, ""))
    for (seed, index), value in sorted(samples.items()):
        size = _run_size(told, totals[seed], sum(own == seed for own, _ in counted))
        found.setdefault((seed, index // size), []).append(value)
    return list(found.values())


def _run_size(told: int | float | str | None, total: int, repeats: int) -> int:
    """Return how many successive indices are of one run; all of them where nothing tells."""
    if isinstance(told, int | float) and told >= 1:
        return int(told)
    return -(-total // repeats) if repeats else total


def interval_over_runs(metric: str, runs: Sequence[Sequence[float]], kind: str) -> Interval:
    """Return the interval over runs of their medians or percentiles; of a single run its samples', without coverage.

    Args:
        metric: decides between median and percentile.
        runs: the samples of each run, at least one.
        kind: what the samples are of.
    """
    whole = _plain(metric, [value for run in runs for value in run])
    if whole.n == 1:
        return whole
    tail = percentile_of(metric)
    name = f"p{tail[1]:.0f}" if tail and tail[1] != 50 else "median"
    if len(runs) == 1:
        return replace(whole, of_one_run=kind, level=0.0, method=f"{name} over {kind} of one run, order statistics")
    found = median_interval([_plain(metric, run).estimate for run in runs])
    # A tail that all samples together cannot bound is not known better for having been cut into runs.
    level = found.level if name == "median" else min(found.level, whole.level)
    return replace(found, level=level, method=f"{name} of each run, then {found.method}")


def interval_of(metric: str, samples: Samples) -> Interval:
    """Return Wilson's interval for what is right or wrong, a percentile's where its name asks, else the median's."""
    return _plain(metric, list(samples.values()))


def _plain(metric: str, values: Sequence[float]) -> Interval:
    tail = percentile_of(metric)
    if tail is not None:
        return quantile_interval(values, tail[1])
    if metric in SHARES and set(values) <= {0.0, 1.0}:
        return wilson_interval(round(sum(values)), len(values))
    return median_interval(values)


def paired_interval(a: Samples, b: Samples) -> Interval | None:
    """Return the interval of a - b over the (seed, index) they share, or None."""
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    return paired_difference_interval([a[found] for found in shared], [b[found] for found in shared])
