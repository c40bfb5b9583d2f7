"""The figure that most experiments want: one panel per metric, one line per strategy, the swept value on x."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from kvatlas.records.schema import RunManifest
from kvatlas.reports.captions import caption
from kvatlas.reports.figures.canvas import (
    Plot,
    doubling_x,
    draw_lines,
    entries_for,
    positive,
    provenance_suffix,
    sheet,
    whole_y,
)
from kvatlas.reports.figures.theme import Look, Palette
from kvatlas.reports.quantities import title as metric_title
from kvatlas.reports.series import AXES, Series, Study

_SPREAD = "Marks of one setting stand a little apart, so that none hides another."
_COUNTS = frozenset({"peak_running", "preemptions"})


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric over the swept value.

    Args:
        metric: stored or derived.
        log_y: True for what grows with length; zeros are then left out.
        extra: draws something more, given the panel and the swept values.
    """

    metric: str
    log_y: bool = False
    extra: Callable[[Any, Sequence[float]], None] | None = None


def sweep_plot(
    study: Study,
    name: str,
    title: str,
    reading: str,
    panels: Sequence[Panel],
    palette: Palette,
    runs: Sequence[RunManifest],
) -> Plot | None:
    """Return the figure of those panels that have samples, or None without any."""
    found = [(panel, tuple(study.series(panel.metric))) for panel in panels]
    found = [(panel, series) for panel, series in found if _drawable(panel, series)]
    if not found:
        return None
    every = [one for _, series in found for one in series]
    text = caption(study, every, runs)
    looks = palette.looks(one.key.name for one in every)
    return Plot(
        name=name,
        experiment=study.experiment,
        title=title,
        caption=text,
        reading=f"{reading} {_SPREAD}",
        tables=tuple((panel.metric, series) for panel, series in found),
        paint=lambda: _paint(study, title, text, found, looks),
    )


def _drawable(panel: Panel, series: Sequence[Series]) -> bool:
    if panel.metric == "preemptions" and not positive(series):
        return False
    return bool(series) and (not panel.log_y or positive(series))


def _paint(
    study: Study,
    title: str,
    text: str,
    found: Sequence[tuple[Panel, Sequence[Series]]],
    looks: Mapping[str, Look],
) -> Figure:
    entries = entries_for([one for _, series in found for one in series], looks)
    figure, axes = sheet(title, text, entries, len(found), panel_height=3.2 if len(found) == 1 else 2.7)
    for place, (axis, (panel, series)) in enumerate(zip(axes, found, strict=True)):
        values = [mark.x for one in series for mark in one.marks]
        unit = draw_lines(axis, series, looks, log_y=panel.log_y)
        if panel.extra is not None:
            panel.extra(axis, sorted(set(values)))
        if panel.metric in _COUNTS:
            whole_y(axis)
        bottom = place >= len(found) - 2
        doubling_x(axis, values, AXES[study.swept or ""] if bottom else "", most=8 if len(found) == 1 else 5)
        name = metric_title(panel.metric) + ("" if panel.metric in _COUNTS or not unit else f" ({unit})")
        _name_y(axis, name + provenance_suffix(series), alone=len(found) == 1)
    return figure


def _name_y(axis: Any, name: str, *, alone: bool) -> None:
    """Name the y axis along it; above it where panels are narrow."""
    if alone:
        axis.set_ylabel("\n".join(textwrap.wrap(name, 40)))
    else:
        axis.set_title(name)
