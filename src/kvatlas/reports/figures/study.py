"""The study's numbers and ours on one axis: ratios between strategies, and points of accuracy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from kvatlas.metrics.statistics import Interval
from kvatlas.reports.figures.canvas import PLAIN, Entry, Plot, log_ticks, sheet
from kvatlas.reports.figures.theme import Look
from kvatlas.reports.findings.findings import Finding
from kvatlas.reports.findings.rules import Kind, Range, proves_nothing
from kvatlas.reports.labels import NO_LINK
from kvatlas.reports.published import TRUST

_PUBLISHED = Look(color="C0", marker="D", line="")
_OURS = Look(color="C1", marker="o", line="")
_EMULATED = Look(color="C2", marker="s", line="")
_PANELS: tuple[tuple[Kind, str], ...] = (
    ("ratio", "Ratio between two strategies"),
    ("points", "Difference to the full cache (points)"),
    ("share", "Early facts retained (%)"),
)
_MOST = 18
_TITLE = "What the study found, and what was found here"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published number and ours."""

    kind: Kind
    statement: str
    label: str
    published: Range
    interval: Interval
    emulated: bool


def study_plots(found: Sequence[Finding]) -> list[Plot]:
    """Return the figure of every statement that has both numbers; none where none has."""
    rows = [row for one in found for row in _rows(one)]
    if not rows:
        return []
    return [
        _plot(kind, axis, mine) for kind, axis in _PANELS if (mine := [row for row in rows if row.kind == kind][:_MOST])
    ]


def _plot(kind: Kind, axis: str, rows: Sequence[Row]) -> Plot:
    counts = sorted({row.interval.n for row in rows})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    methods = " / ".join(dict.fromkeys(row.interval.method for row in rows))
    squares = " Squares rest on an emulated link." if any(row.emulated for row in rows) else ""
    text = (
        f"The study: Llama-3.1-8B on H100 GPUs, {TRUST}. Ours: the models, settings and hardware named in the tables "
        f"below. n = {number} per mark; bars: {methods}.{squares}"
    )
    title = f"{_TITLE}: {axis[0].lower()}{axis[1:]}"
    return Plot(
        name=f"study_{kind}",
        experiment="study",
        title=title,
        caption=text,
        reading="Each row is one statement; its number leads to the finding below. The diamond, with its range, is the "
        f"study's number ({TRUST}); the dot is ours, with its interval, hollow where a single sample or run decides "
        "nothing. A number alone is no verdict: the rules are above.",
        tables=(),
        paint=lambda: _paint(kind, axis, (title, text), rows),
    )


def _rows(one: Finding) -> list[Row]:
    """Return the statements that have both numbers; under a link, only what the link touched, if there is more."""
    real = any(judged.link == NO_LINK for judged in one.judged)
    rows = [
        Row(
            kind=part.kind,
            statement=part.statement,
            label=", ".join(word for word in (f"{one.number}. {part.statement}", judged.apart) if word)
            + (" (emulated link)" if part.emulated else ""),
            published=part.published_range,
            interval=part.interval,
            emulated=part.emulated,
        )
        for judged in one.judged
        for part in judged.parts
        if part.published_range is not None and part.interval is not None and part.kind
        if part.emulated or judged.link == NO_LINK or not real
    ]
    order = {statement: place for place, statement in enumerate(dict.fromkeys(row.statement for row in rows))}
    return sorted(rows, key=lambda row: (order[row.statement], row.emulated))


def _paint(kind: Kind, axis_name: str, words: tuple[str, str], rows: Sequence[Row]) -> Figure:
    entries = [Entry(label=f"the study ({TRUST})", look=_PUBLISHED), Entry(label="here", look=_OURS)]
    if any(row.emulated for row in rows):
        entries.append(Entry(label="here, on an emulated link", look=_EMULATED))
    figure, (axis,) = sheet(*words, entries, 1, 0.9 + 0.4 * len(rows))
    factor = 1 if kind == "ratio" else 100
    for place, row in enumerate(rows):
        low, high = (end * factor for end in row.published)
        middle = (low * high) ** 0.5 if kind == "ratio" else (low + high) / 2
        _mark(axis, place - 0.16, (low, middle, high), _PUBLISHED, hollow=True)
        ends = tuple(end * factor for end in (row.interval.low, row.interval.estimate, row.interval.high))
        look = _EMULATED if row.emulated else _OURS
        _mark(axis, place + 0.16, (ends[0], ends[1], ends[2]), look, hollow=proves_nothing(row.interval))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(range(len(rows)), ["\n".join(textwrap.wrap(row.label, 52)[:2]) for row in rows], fontsize=7.5)
    if kind != "share":
        axis.axvline(1 if kind == "ratio" else 0, color="C0", linestyle=":", linewidth=1)
    axis.set_xlabel(axis_name)
    if kind == "ratio":
        _log_x(axis)
    else:
        axis.xaxis.set_major_formatter(PLAIN)
    return figure


def _mark(axis: Any, place: float, ends: tuple[float, float, float], look: Look, *, hollow: bool) -> None:
    low, middle, high = ends
    axis.errorbar(
        [middle],
        [place],
        xerr=None if low == high else [[middle - low], [high - middle]],
        color=look.color,
        marker=look.marker,
        markersize=5.5,
        markerfacecolor="none" if hollow else look.color,
        capsize=2.5,
        elinewidth=1.2,
    )


def _log_x(axis: Any) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_xlim(low, high)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(PLAIN)
