"""What each metric is called, and how its values are written: stored in seconds and bytes, printed in ms and MiB."""

from __future__ import annotations

import re

from kvatlas.core.units import format_bytes, format_seconds
from kvatlas.metrics.statistics import LEVEL, Interval
from kvatlas.reports.labels import format_share

SHARE = "share"
POINTS = "points"
SHARES = frozenset({"correct", "acc", "acc_norm", "exact_match"})

_TITLES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "e2e": "End-to-end latency",
    "prefill_cpu": "CPU time of prefill",
    "kv_peak": "Peak KV memory",
    "device_peak": "Peak KV memory on the device",
    "host_peak": "Peak KV memory on the host",
    "kv_after_prefill": "KV memory after prefill",
    "sidecars_after_prefill": "Sidecars after prefill",
    "cache_after_prefill": "KV memory and sidecars after prefill",
    "output_throughput": "Output throughput",
    "output_throughput_cpu": "Output throughput per CPU second",
    "decode_throughput": "Decode throughput",
    "request_throughput": "Request throughput",
    "throughput_per_live_gb": "Throughput per GB of live device memory",
    "throughput_per_pool_gb": "Throughput per GB of the smallest pool",
    "smallest_pool": "Smallest pool that runs all at once",
    "peak_running": "Most requests running at once",
    "preemptions": "Preemptions",
    "swaps": "Swaps to the host",
    "goodput": "Goodput",
    "slo_attainment": "Requests within the SLO",
    "decode_time": "Time from the first token to the last",
    "correct": "Right answers",
    "acc": "Accuracy",
    "acc_norm": "Accuracy, length-normalised",
    "exact_match": "Exact matches",
    "difference": "Difference to the full cache",
    "device_kv": "Keys and values on the device",
    "device_sketch": "Partial keys on the device",
    "device_staging": "Staging on the device",
    "device_sidecars": "Sidecars on the device",
    "host_kv": "Keys and values on the host",
    "step_time": "Decode step",
    "attend_time": "Attention",
    "speculate_time": "Speculation",
    "wait_time": "Waiting for moves",
    "fetch_time": "Fetches from the host",
    "store_time": "Stores to the host",
    "transfer_time": "Moves between the tiers",
    "compute_time": "Decode step of full, without any move",
    "other_time": "Everything else",
    "hidden_share": "Share of the moves hidden behind compute",
    "transfer_to_compute": "Moves over compute",
    "bound_reached": "Longer of compute and moves, over the step",
    "speculation_recall": "Speculation: share of the exact top found",
    "speculation_mass": "Speculation: attention mass on what was read",
    "selected_fraction": "Share of the cached tokens read per step",
    "weights_bytes": "Weights",
}
_PERCENTILE = re.compile(r"(\w+)_p(\d+)$")


def percentile_of(metric: str) -> tuple[str, float] | None:
    """Return (stored metric, rank) of a name such as ``ttft_p99``, or None for a metric that is no percentile."""
    found = _PERCENTILE.fullmatch(metric)
    return (found[1], float(found[2])) if found else None


def title(metric: str) -> str:
    """Return the metric's name for readers."""
    found = percentile_of(metric)
    if found is not None:
        return f"{title(found[0])}, {'median' if found[1] == 50 else f'p{found[1]:.0f}'}"
    return _TITLES.get(metric) or metric.replace("_", " ")


def format_quantity(value: float, unit: str) -> str:
    """Return the value with its unit, three significant digits."""
    if unit == "s":
        return format_seconds(value) if value else "0 s"
    if unit == "bytes":
        return format_bytes(value)
    if unit == SHARE:
        return format_share(value)
    if unit == POINTS:
        return f"{round(value * 100):+d} points".replace("-", "\N{MINUS SIGN}")
    return f"{significant(value)} {unit}".strip()


def significant(value: float) -> str:
    """Return three significant digits, thousands apart, never an exponent for what people count."""
    return f"{float(f'{value:.3g}'):,.10g}" if abs(value) < 1e12 else f"{value:.3g}"


def format_range(interval: Interval, unit: str) -> str:
    """Return ``"12.1 to 13.0 ms"``, with the coverage it really has where that is below 95 %, or that it has none."""
    if interval.n == 1:
        return "n=1, no interval"
    if interval.low == interval.high:
        return f"equal in all {interval.n}"
    low, high = format_quantity(interval.low, unit), format_quantity(interval.high, unit)
    number, _, low_unit = low.partition(" ")
    text = f"{number if low_unit == high.partition(' ')[2] else low} to {high}"
    if interval.of_one_run:
        return f"{text} ({interval.n} {interval.of_one_run} of one run)"
    return text if interval.level >= LEVEL else f"{text} (range of {interval.n}: {interval.level:.0%})"


def axis_scale(unit: str, largest: float) -> tuple[float, str]:
    """Return (divisor, unit to print) that keep an axis in readable numbers."""
    if unit == "s":
        return (1e-3, "ms") if largest < 1 else (1.0, "s")
    if unit == "bytes":
        steps = ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
        return next(((float(size), name) for size, name in steps if largest >= size), (1.0, "bytes"))
    return {SHARE: (0.01, "%"), POINTS: (0.01, POINTS)}.get(unit, (1.0, unit))
