"""The figure that most experiments want: one panel per metric, one line per strategy, the swept value on x."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from kvatlas.reports.captions import caption
from kvatlas.reports.figures.canvas import (
    Entry,
    Plot,
    doubling_x,
    draw_lines,
    draw_refusals,
    entries_for,
    positive,
    provenance_suffix,
    sheet,
    whole_y,
)
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.figures.theme import Look
from kvatlas.reports.known import AXES
from kvatlas.reports.labels import NO_LINK, told
from kvatlas.reports.quantities import title as metric_title
from kvatlas.reports.refusals import Refusal, refusals
from kvatlas.reports.series import Series, Study

_SPREAD = "Marks of one setting stand a little apart, so that none hides another."
_COUNTS = frozenset({"peak_running", "preemptions", "swaps"})
# Left out where nothing of the kind happened.
_RARE = frozenset({"preemptions", "swaps", "host_peak"})


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric over the swept value.

    Args:
        metric: stored or derived.
        log_y: True for what grows with length; zeros are then left out.
        extra: draws something more, given the panel and the swept values.
        limits: True to mark where points were refused.
    """

    metric: str
    log_y: bool = False
    extra: Callable[[Any, Sequence[float]], None] | None = None
    limits: bool = False


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A figure over the swept value, before there are records.

    Args:
        name: of its files.
        title: the question it answers.
        reading: how to read it.
        panels: its metrics.
        columns: panels in a row.
    """

    name: str
    title: str
    reading: str
    panels: tuple[Panel, ...]
    columns: int = 2


def sweep_plot(sweep: Sweep, scene: Scene) -> Plot | None:
    """Return the figure of those panels that have samples, or None without any."""
    study = scene.study
    found = [(panel, tuple(study.series(panel.metric))) for panel in sweep.panels]
    found = [(panel, series) for panel, series in found if _drawable(panel, series)]
    if not found:
        return None
    every = [one for _, series in found for one in series]
    text = caption(study, every, scene.runs)
    ends = refusals(study, scene.points) if any(panel.limits for panel, _ in found) else []
    looks = scene.palette.looks([*(one.key.name for one in every), *(end.name for end in ends)])
    title = titled(sweep.title, study)
    return Plot(
        name=f"{sweep.name}{scene.suffix}",
        experiment=study.experiment,
        title=title,
        caption=text,
        reading=" ".join([sweep.reading, _SPREAD, *_told(ends)]),
        tables=tuple((panel.metric, series) for panel, series in found),
        paint=lambda: paint_panels((title, text), found, looks, AXES[study.swept or ""], sweep.columns, ends),
    )


def titled(title: str, study: Study) -> str:
    """Return the title, and that a link was emulated where it was."""
    return title if study.link == NO_LINK else f"{title} (emulated link: {study.link})"


def _drawable(panel: Panel, series: Sequence[Series]) -> bool:
    if panel.metric in _RARE and not positive(series):
        return False
    return bool(series) and (not panel.log_y or positive(series))


def _told(ends: Sequence[Refusal]) -> list[str]:
    """Return a sentence per strategy that reached a limit: the first length that was refused."""
    first: dict[str, Refusal] = {}
    for end in ends:
        first.setdefault(end.name, end)
    return [f"{told(end.name)}: {end.told} tokens ({end.reason})." for end in first.values()]


def paint_panels(
    words: tuple[str, str],
    found: Sequence[tuple[Panel, Sequence[Series]]],
    looks: Mapping[str, Look],
    axis_name: str,
    columns: int = 2,
    ends: Sequence[Refusal] = (),
) -> Figure:
    """Return a figure of lines: (title, caption), panels with their series, name -> look, what x is."""
    every = [one for _, series in found for one in series]
    drawn = {one.key.name for one in every}
    refused_only = [name for name in dict.fromkeys(end.name for end in ends) if name not in drawn]
    entries = entries_for(every, looks) + [Entry(label=told(name), look=looks[name]) for name in refused_only]
    alone = len(found) == 1
    figure, axes = sheet(*words, entries, len(found), 3.2 if alone else 2.7, columns=columns)
    for place, (axis, (panel, series)) in enumerate(zip(axes, found, strict=True)):
        values = [mark.x for one in series for mark in one.marks]
        unit = draw_lines(axis, series, looks, log_y=panel.log_y)
        if panel.extra is not None:
            panel.extra(axis, sorted(set(values)))
        if panel.metric in _COUNTS:
            whole_y(axis)
        values += [end.x for end in ends if panel.limits]
        bottom = place >= len(found) - columns
        doubling_x(axis, values, axis_name if bottom else "", most=8 if alone else 5)
        if panel.limits:
            draw_refusals(axis, ends, looks)
        name = metric_title(panel.metric) + ("" if panel.metric in _COUNTS or not unit else f" ({unit})")
        name_y(axis, name + provenance_suffix(series), alone=alone, width=48 if columns == 2 else 30)
    return figure


def name_y(axis: Any, name: str, *, alone: bool = False, width: int = 48) -> None:
    """Name the y axis along it; above it where panels are narrow."""
    if alone:
        axis.set_ylabel("\n".join(textwrap.wrap(name, 40)))
    else:
        axis.set_title("\n".join(textwrap.wrap(name, width)))
