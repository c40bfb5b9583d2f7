"""Figures of a replayed trace: how latencies spread over its requests, and what was served in total."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from kvatlas.records.schema import RunManifest
from kvatlas.reports.captions import caption
from kvatlas.reports.figures.canvas import PLAIN, Plot, entries_for, log_ticks, provenance_suffix, sheet
from kvatlas.reports.figures.theme import Look, Palette
from kvatlas.reports.labels import SeriesKey
from kvatlas.reports.quantities import axis_scale, title as metric_title
from kvatlas.reports.series import SampleId, Series, Study

_LATENCIES = ("ttft", "tpot")
_TOTALS = ("goodput", "request_throughput", "output_throughput", "kv_peak")
_LIMIT = re.compile(r"(TTFT|TPOT)\s*<=\s*([\d.]+)\s*(ms|s)\b")


def plots(study: Study, palette: Palette, runs: Sequence[RunManifest], suffix: str = "") -> list[Plot]:
    """Return the figures of one replay; ``suffix`` keeps the names of several replays apart."""
    found = [_latencies(study, palette, runs, suffix), _totals(study, palette, runs, suffix)]
    return [plot for plot in found if plot is not None]


def _latencies(study: Study, palette: Palette, runs: Sequence[RunManifest], suffix: str) -> Plot | None:
    shown = {metric: tuple(study.series(metric)) for metric in _LATENCIES if study.samples(metric)}
    if not shown:
        return None
    title = "How long do the trace's requests wait for the first token, and for each one after it?"
    every = [one for series in shown.values() for one in series]
    text = caption(study, every, runs).replace("per mark", "requests per curve")
    looks = palette.looks(one.key.name for one in every)
    return Plot(
        name=f"trace_latency{suffix}",
        experiment=study.experiment,
        title=title,
        caption=text,
        reading="Share of requests that were at least this fast: further left is better. The mark on each curve is its "
        "median, the bar its interval; a vertical line is a limit of the SLO, where it lies near. Requests of one "
        "replay queue behind each other, so they are not independent and the intervals are too narrow.",
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


def _totals(study: Study, palette: Palette, runs: Sequence[RunManifest], suffix: str) -> Plot | None:
    shown = {metric: tuple(study.series(metric)) for metric in _TOTALS if study.samples(metric)}
    if not shown:
        return None
    title = "How many requests and tokens per second, and how much KV memory for them?"
    every = [one for series in shown.values() for one in series]
    text = caption(study, every, runs).replace("per mark", "per bar")
    slo = study.rows[0].params.get("slo")
    return Plot(
        name=f"trace_totals{suffix}",
        experiment=study.experiment,
        title=title,
        caption=text,
        reading="Rates: longer is better; KV memory: shorter is better. "
        + (f"Goodput counts the requests that meet every limit of the SLO: {slo}. " if slo else "")
        + "A bar is drawn only with its interval; a hollow mark is one replay without any.",
        tables=tuple(shown.items()),
        paint=lambda: _paint_totals(title, text, shown, palette.looks(one.key.name for one in every)),
    )


def _paint_totals(title: str, text: str, shown: Mapping[str, Sequence[Series]], looks: Mapping[str, Look]) -> Figure:
    keys = list(dict.fromkeys(one.key for series in shown.values() for one in series))
    figure, axes = sheet(title, text, (), len(shown), panel_height=0.75 + 0.34 * len(keys))
    for place, (axis, (metric, series)) in enumerate(zip(axes, shown.items(), strict=True)):
        scale, unit = axis_scale(series[0].unit, max(one.marks[0].interval.high for one in series))
        for one in series:
            _bar(axis, keys.index(one.key), one, looks[one.key.name], scale)
        axis.set_title(f"{metric_title(metric)} ({unit}){provenance_suffix(series)}")
        axis.set_ylim(len(keys) - 0.4, -0.6)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(PLAIN)
        axis.grid(visible=False, axis="y")
        axis.set_yticks(range(len(keys)), [_short(key) if place % 2 == 0 else "" for key in keys])
    return figure


def _bar(axis: Any, place: int, one: Series, look: Look, scale: float) -> None:
    spread = one.marks[0].interval
    value = spread.estimate / scale
    style = {"color": look.color, "marker": look.marker, "markersize": 6}
    if spread.n == 1:
        axis.plot([0, value], [place, place], color=look.color, linewidth=1, linestyle=":")
        axis.errorbar([value], [place], markerfacecolor="none", **style)
        return
    ends = [[(spread.estimate - spread.low) / scale], [(spread.high - spread.estimate) / scale]]
    axis.barh([place], [value], height=0.55, color=look.color, alpha=0.35)
    axis.errorbar([value], [place], xerr=ends, capsize=2.5, elinewidth=1.2, **style)


def _short(key: SeriesKey) -> str:
    return "\n".join(textwrap.wrap(key.label, 30)[:2])
