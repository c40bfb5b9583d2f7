"""Figures of the concurrency sweep: throughput, memory and requests at once, throughput per GB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvatlas.records.schema import RunManifest
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.sweep import Panel, sweep_plot
from kvatlas.reports.figures.theme import Palette
from kvatlas.reports.series import Study


def plots(study: Study, palette: Palette, runs: Sequence[RunManifest], suffix: str = "") -> list[Plot]:
    """Return the figures of one study; ``suffix`` keeps the names of several studies apart."""
    throughput = sweep_plot(
        study,
        f"throughput_by_concurrency{suffix}",
        "How many tokens per second, as requests join?",
        "Higher is better. Throughput per CPU second leaves out the time in which other programs held the machine.",
        [Panel(metric="output_throughput"), Panel(metric="output_throughput_cpu")],
        palette,
        runs,
    )
    memory = sweep_plot(
        study,
        f"kv_memory_by_concurrency{suffix}",
        "How much KV memory at its peak, and how many requests really run at once?",
        "KV memory counts live bytes, sidecars included: lower is better. The dotted line is the number of requests "
        "asked for; a strategy below it had to queue or preempt some, so its memory is that of fewer requests.",
        [Panel(metric="kv_peak"), Panel(metric="peak_running", extra=_asked_for), Panel(metric="preemptions")],
        palette,
        runs,
    )
    per_gb = sweep_plot(
        study,
        f"throughput_per_gb_by_concurrency{suffix}",
        "How many tokens per second does each GB of live KV memory buy?",
        "Higher is better. Output throughput over the peak of live cache bytes (GB = 10⁹ bytes, sidecars included), "
        "not over the memory of the whole process.",
        [Panel(metric="throughput_per_gb")],
        palette,
        runs,
    )
    return [plot for plot in (throughput, memory, per_gb) if plot is not None]


def _asked_for(axis: Any, values: Sequence[float]) -> None:
    axis.plot(values, values, color="C0", linestyle=":", linewidth=1, alpha=0.6, zorder=1)
