"""A sheet of panels with title, legend and caption, and the lines with error bars that go on it."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from kvatlas.reports.figures.theme import Look, slimmed, themed
from kvatlas.reports.labels import short_names, told
from kvatlas.reports.quantities import axis_scale, significant
from kvatlas.reports.refusals import Refusal
from kvatlas.reports.series import Mark, Series

Format = Literal["png", "svg"]

# Writes 20,000 where matplotlib would write 20000, or 2 with an exponent in a corner.
PLAIN = FuncFormatter(lambda value, _: significant(value))

_WIDTH = 7.6
_MARGIN = 0.12
_TITLE = (72, 0.23)
_CAPTION = (124, 0.145)
_LEGEND_LINE = 0.19
_CHARACTER = 0.078
_PNG_DPI = 150


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure that is yet to be drawn.

    Args:
        name: of its files, without ending; unique in a report.
        experiment: the experiment it belongs to.
        title: the question it answers.
        caption: model, hardware, n ...
        reading: how to read it, and what was left out.
        tables: (metric, series) of all that is drawn, for readers who cannot see it.
        paint: returns a new figure, under the current matplotlib settings.
    """

    name: str
    experiment: str
    title: str
    caption: str
    reading: str
    tables: tuple[tuple[str, tuple[Series, ...]], ...]
    paint: Callable[[], Figure]

    def named(self, name: str) -> Plot:
        """Return the same figure under another name."""
        return replace(self, name=name)

    def render(self) -> dict[Format, bytes]:
        """Return the drawing as files' contents, on white; the same records give the same bytes."""
        with themed():
            figure = self.paint()
            drawn: dict[Format, bytes] = {"svg": slimmed(_saved(figure, "svg"))}
            figure.set_layout_engine("none")  # keeps the places found; finding them again takes as long as drawing
            drawn["png"] = _saved(figure, "png")
            return drawn


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the legend."""

    label: str
    look: Look


def sheet(
    title: str, caption: str, entries: Sequence[Entry], num_panels: int, panel_height: float = 2.9, columns: int = 2
) -> tuple[Figure, list[Any]]:
    """Return a figure with this many panels, two a row unless told, and room for title, legend and caption."""
    titles, captions = textwrap.wrap(title, _TITLE[0]), textwrap.wrap(caption, _CAPTION[0])
    columns, legend_columns = min(num_panels, columns), _legend_columns(entries)
    rows, legend_rows = -(-num_panels // columns), -(-len(entries) // legend_columns)
    top = _MARGIN + len(titles) * _TITLE[1] + 0.04
    below = _MARGIN + len(captions) * _CAPTION[1]
    bottom = below + 0.08 + legend_rows * _LEGEND_LINE
    height = top + rows * panel_height + bottom
    inside = (0.012, bottom / height, 0.976, 1 - (top + bottom) / height)
    figure = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(rect=inside, hspace=0.04))
    left = 0.018
    figure.text(
        left, 1 - _MARGIN / height, "\n".join(titles), fontsize=12, fontweight="bold", va="top", in_layout=False
    )
    figure.text(left, below / height, "\n".join(captions), fontsize=7.5, va="top", alpha=0.85, in_layout=False)
    if entries:
        _legend(figure, entries, legend_columns, (left - 0.004, bottom / height))
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = list(grid.flat)
    for spare in panels[num_panels:]:
        spare.set_axis_off()
    return figure, panels[:num_panels]


def draw_lines(panel: Any, series: Sequence[Series], looks: Mapping[str, Look], *, log_y: bool = False) -> str:
    """Draw each series with its error bars; returns the unit of the y axis. Zeros have no place on a log axis."""
    highest = max(mark.interval.high for one in series for mark in one.marks)
    scale, unit = axis_scale(series[0].unit, highest)
    step = min(1.05, 1.25 ** (1 / max(1, len(series) - 1)))
    for place, one in enumerate(series):
        marks = [mark for mark in one.marks if mark.interval.low > 0 or not log_y]
        if marks:
            _line(panel, marks, looks[one.key.name], scale, step ** (place - (len(series) - 1) / 2))
    if log_y:
        _log_y(panel)
    else:
        panel.set_ylim(0, highest / scale * 1.08 or 1)
        panel.yaxis.set_major_formatter(PLAIN)
    return unit


def draw_refusals(panel: Any, ends: Sequence[Refusal], looks: Mapping[str, Look]) -> None:
    """Mark with a cross, in a row per strategy above the curves, what was refused; the first one says why."""
    names = list(dict.fromkeys(end.name for end in ends))
    if not names:
        return
    row, short = 0.075, short_names(names)
    low, high = panel.get_ylim()
    room = row * len(names) + 0.02
    logarithmic = panel.get_yscale() == "log"
    panel.set_ylim(low, high * (high / low) ** (room / (1 - room)) if logarithmic else high / (1 - room))
    for place, name in enumerate(names):
        y = 1 - row * (place + 0.5)
        mine = [end for end in ends if end.name == name]
        where = panel.get_xaxis_transform()
        color = looks[name].color
        panel.plot([end.x for end in mine], [y] * len(mine), "x", color=color, transform=where, markersize=6)
        left, right = panel.get_xlim()
        before = mine[0].x > (left * right) ** 0.5
        panel.annotate(
            f"{short[name]} {mine[0].told}",
            (mine[0].x if before else mine[-1].x, y),
            xycoords=where,
            xytext=(-7 if before else 7, 0),
            textcoords="offset points",
            ha="right" if before else "left",
            va="center",
            fontsize=7.5,
            color=color,
        )


def doubling_x(panel: Any, values: Iterable[float], label: str, most: int = 6, factor: float = 1) -> None:
    """Make x an axis on which doubling is one step, with ticks at measured values only, printed times the factor."""
    ticks = sorted(set(values))
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // most)]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * factor:,.7g}"))
    panel.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    panel.set_xlabel(label)


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between low and high, about three to nine of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) > 2:
            return inside
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def whole_y(panel: Any) -> None:
    """Keep the ticks of counts at whole numbers."""
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))


def entries_for(series: Iterable[Series], looks: Mapping[str, Look]) -> list[Entry]:
    """Return one legend line per name."""
    return [Entry(label=told(name), look=looks[name]) for name in dict.fromkeys(one.key.name for one in series)]


def provenance_suffix(series: Iterable[Series]) -> str:
    """Return "", ", estimated" or ", partly estimated": what a panel's heading must say."""
    found = {kind for one in series for kind in one.provenances}
    other = " and ".join(sorted(found - {"measured"}))
    return f", {'partly ' if 'measured' in found else ''}{other}" if other else ""


def positive(series: Iterable[Series]) -> bool:
    """Whether any mark is above zero, so that a log axis has something to show."""
    return any(mark.interval.low > 0 for one in series for mark in one.marks)


def _line(panel: Any, marks: Sequence[Mark], look: Look, scale: float, dodge: float) -> None:
    """Draw one series; a mark without an interval is hollow."""
    x = [mark.x * dodge for mark in marks]
    y = [mark.interval.estimate / scale for mark in marks]
    panel.plot(x, y, color=look.color, linestyle=look.line, linewidth=1.4, alpha=0.85)
    for hollow in (False, True):
        places = [place for place, mark in enumerate(marks) if (mark.interval.n == 1) == hollow]
        if not places:
            continue
        spreads = [marks[place].interval for place in places]
        below = [(spread.estimate - spread.low) / scale for spread in spreads]
        above = [(spread.high - spread.estimate) / scale for spread in spreads]
        panel.errorbar(
            [x[place] for place in places],
            [y[place] for place in places],
            yerr=None if hollow else [below, above],
            color=look.color,
            marker=look.marker,
            markersize=5,
            markerfacecolor="none" if hollow else look.color,
            linestyle="none",
            elinewidth=1.2,
            capsize=2.5,
        )


def _log_y(panel: Any) -> None:
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high / low < 4:
        low, high = low / 1.5, high * 1.5
    panel.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    panel.set_ylim(low, high)
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(PLAIN)


def _legend_columns(entries: Sequence[Entry]) -> int:
    widest = max((len(entry.label) for entry in entries), default=1) * _CHARACTER + 0.6
    return max(1, min(len(entries), int((_WIDTH - 0.2) / widest)))


def _legend(figure: Figure, entries: Sequence[Entry], columns: int, corner: tuple[float, float]) -> None:
    handles = [
        Line2D([], [], color=entry.look.color, marker=entry.look.marker, linestyle=entry.look.line, markersize=5)
        for entry in entries
    ]
    figure.legend(
        handles,
        [entry.label for entry in entries],
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        borderaxespad=0.1,
        borderpad=0.1,
        labelspacing=0.45,
        handlelength=2.2,
        columnspacing=1.4,
    )


def _saved(figure: Figure, kind: Format) -> bytes:
    """Return the file's bytes, without the date of drawing."""
    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": "kvatlas"}
    figure.savefig(file, format=kind, dpi=_PNG_DPI, metadata=metadata)
    return file.getvalue()
