"""Figures of a replayed trace: how latencies spread over its requests, and what was served in total."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from kvatlas.reports.captions import caption
from kvatlas.reports.figures.bars import paint_bars
from kvatlas.reports.figures.canvas import PLAIN, Plot, entries_for, log_ticks, provenance_suffix, sheet
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.figures.sweep import titled
from kvatlas.reports.figures.theme import Look
from kvatlas.reports.intervals import SampleId
from kvatlas.reports.quantities import axis_scale, title as metric_title
from kvatlas.reports.series import Series, Study

_LATENCIES = ("ttft", "tpot")
_TOTALS = ("goodput", "request_throughput", "output_throughput", "kv_peak", "host_peak")
_LIMIT = re.compile(r"(TTFT|TPOT)\s*<=\s*([\d.]+)\s*(ms|s)\b")


def plots(scene: Scene) -> list[Plot]:
    """Return the figures of one replay."""
    return [plot for plot in (_latencies(scene), _totals(scene)) if plot is not None]


def _latencies(scene: Scene) -> Plot | None:
    study = scene.study
    shown = {metric: tuple(study.series(metric)) for metric in _LATENCIES if study.samples(metric)}
    if not shown:
        return None
    title = titled("How long do the trace's requests wait for the first token, and for each one after it?", study)
    every = [one for series in shown.values() for one in series]
    single = any(mark.interval.of_one_run for one in every for mark in one.marks)
    text = caption(study, every, scene.runs).replace("per mark", f"{'requests' if single else 'replays'} per curve")
    looks = scene.palette.looks(one.key.name for one in every)
    return Plot(
        name=f"trace_latency{scene.suffix}",
        experiment=study.experiment,
        title=title,
        caption=text,
        reading="Share of requests that were at least this fast: further left is better. The mark on each curve is its "
        "median, the bar its interval; a vertical line is a limit of the SLO, where it lies near. Requests of one "
        "replay queue behind each other, so they are not independent: the bar shows a spread and claims no coverage.",
        tables=tuple(shown.items()),
        paint=lambda: _paint_latencies(study, title, text, shown, looks),
    )


def _paint_latencies(
    study: Study, title: str, text: str, shown: Mapping[str, Sequence[Series]], looks: Mapping[str, Look]
) -> Figure:
    entries = entries_for([one for series in shown.values() for one in series], looks)
    figure, axes = sheet(title, text, entries, len(shown), panel_height=3.0)
    for place, (axis, (metric, series)) in enumerate(zip(axes, shown.items(), strict=True)):
        cells = study.samples(metric)
        largest = max(max(cell.values()) for xs in cells.values() for cell in xs.values())
        scale, unit = axis_scale("s", largest)
        for order, one in enumerate(series):
            _curve(axis, cells[one.key], one, looks[one.key.name], scale, (order - (len(series) - 1) / 2) * 1.2)
        axis.set_xscale("log")
        _limit(axis, study, metric, scale)
        label = f"{metric_title(metric)} ({unit}){provenance_suffix(series)}"
        _latency_axes(axis, label, first=place == 0)
    return figure


def _curve(
    axis: Any, cells: Mapping[float, Mapping[SampleId, float]], one: Series, look: Look, scale: float, dodge: float
) -> None:
    """Draw the share of requests up to each latency, and the median with its interval."""
    values = sorted(value / scale for cell in cells.values() for value in cell.values())
    shares = [100 * (rank + 1) / len(values) for rank in range(len(values))]
    axis.step(values, shares, where="post", color=look.color, linestyle=look.line, linewidth=1.4)
    spread = one.marks[0].interval
    low, middle, high = (end / scale for end in (spread.low, spread.estimate, spread.high))
    axis.errorbar(
        [middle],
        [50 + dodge],
        xerr=None if spread.n == 1 else [[middle - low], [high - middle]],
        color=look.color,
        marker=look.marker,
        markersize=5.5,
        markerfacecolor="none" if spread.n == 1 else look.color,
        capsize=2.5,
        elinewidth=1.2,
    )


def _limit(axis: Any, study: Study, metric: str, scale: float) -> None:
    """Draw the SLO's limit for this latency, where it lies near what was measured."""
    low, high = axis.get_xlim()
    for name, number, unit in _LIMIT.findall(str(study.rows[0].params.get("slo", ""))):
        limit = float(number) * (1e-3 if unit == "ms" else 1) / scale
        if name.lower() == metric and low / 2 < limit < high * 4:
            axis.axvline(limit, color="C0", linestyle=":", linewidth=1)


def _latency_axes(axis: Any, label: str, *, first: bool) -> None:
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_xlim(low, high)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(PLAIN)
    axis.set_ylim(0, 102)
    axis.set_xlabel(label)
    if first:
        axis.set_ylabel("Requests served this fast (%)")


def _totals(scene: Scene) -> Plot | None:
    study = scene.study
    shown = {metric: tuple(study.series(metric)) for metric in _TOTALS if study.samples(metric)}
    if not shown:
        return None
    title = titled("How many requests and tokens per second, and how much KV memory for them?", study)
    every = [one for series in shown.values() for one in series]
    text = caption(study, every, scene.runs).replace("per mark", "per bar")
    slo = study.rows[0].params.get("slo")
    looks = scene.palette.looks(one.key.name for one in every)
    panels = [(metric_title(metric), series) for metric, series in shown.items()]
    return Plot(
        name=f"trace_totals{scene.suffix}",
        experiment=study.experiment,
        title=title,
        caption=text,
        reading="Rates: longer is better; KV memory: shorter is better. "
        + (f"Goodput counts the requests that meet every limit of the SLO: {slo}. " if slo else "")
        + "A bar is drawn only with its interval; a hollow mark is one replay without any.",
        tables=tuple(shown.items()),
        paint=lambda: paint_bars(title, text, panels, looks),
    )
