"""What each metric is called, and how its values are written: stored in seconds and bytes, printed in ms and MiB."""

from __future__ import annotations

from kvatlas.core.units import format_bytes, format_seconds
from kvatlas.metrics.statistics import LEVEL, Interval
from kvatlas.reports.labels import format_share

SHARE = "share"
POINTS = "points"
SHARES = frozenset({"correct"})

_TITLES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "e2e": "End-to-end latency",
    "prefill_cpu": "CPU time of prefill",
    "kv_peak": "Peak KV memory",
    "kv_after_prefill": "KV memory after prefill",
    "sidecars_after_prefill": "Sidecars after prefill",
    "cache_after_prefill": "KV memory and sidecars after prefill",
    "outside_pool_peak": "Peak memory outside the pool",
    "output_throughput": "Output throughput",
    "output_throughput_cpu": "Output throughput per CPU second",
    "request_throughput": "Request throughput",
    "throughput_per_gb": "Output throughput per GB of live bytes",
    "peak_running": "Most requests running at once",
    "preemptions": "Preemptions",
    "goodput": "Goodput",
    "correct": "Early facts retained",
    "difference": "Difference to the full cache",
}


def title(metric: str) -> str:
    """Return the metric's name for readers."""
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
    """Return ``"12.1 to 13.0 ms"``, with the coverage it really has where that is below 95 %."""
    if interval.n == 1:
        return "n=1, no interval"
    if interval.low == interval.high:
        return f"equal in all {interval.n}"
    low, high = format_quantity(interval.low, unit), format_quantity(interval.high, unit)
    number, _, low_unit = low.partition(" ")
    text = f"{number if low_unit == high.partition(' ')[2] else low} to {high}"
    return text if interval.level >= LEVEL else f"{text} (range of {interval.n}: {interval.level:.0%})"


def axis_scale(unit: str, largest: float) -> tuple[float, str]:
    """Return (divisor, unit to print) that keep an axis in readable numbers."""
    if unit == "s":
        return (1e-3, "ms") if largest < 1 else (1.0, "s")
    if unit == "bytes":
        steps = ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
        return next(((float(size), name) for size, name in steps if largest >= size), (1.0, "bytes"))
    return {SHARE: (0.01, "%"), POINTS: (0.01, POINTS)}.get(unit, (1.0, unit))
