"""Bars per strategy, each with its interval: of totals without an x axis, and stacked, of the parts of a whole."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvatlas.reports.figures.canvas import PLAIN, Entry, provenance_suffix, sheet
from kvatlas.reports.figures.theme import PARTS, Look
from kvatlas.reports.labels import BASELINE, SeriesKey, format_share, short_names
from kvatlas.reports.quantities import axis_scale, title as metric_title
from kvatlas.reports.series import Series

# A panel: its heading, and the series whose first marks are drawn.
Panel = tuple[str, Sequence[Series]]


# Between a strategy and the study it was measured in, in a row's name; no sentence contains it.
APART = "; "
_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One panel of stacked bars.

    Args:
        heading: above it.
        parts: name of a part -> its series, in the order of the bar from left to right.
        beside: name -> series of what runs at the same time and must not be added: a thin bar of its own.
    """

    heading: str
    parts: Mapping[str, Sequence[Series]]
    beside: Mapping[str, Sequence[Series]]

    @property
    def series(self) -> list[Series]:
        """Everything drawn."""
        return [one for some in (*self.parts.values(), *self.beside.values()) for one in some]


def paint_bars(title: str, text: str, panels: Sequence[Panel], looks: Mapping[str, Look]) -> Figure:
    """Return a figure with a panel per metric and a bar per series."""
    keys = list(dict.fromkeys(one.key for _, series in panels for one in series))
    labels = row_labels(keys)
    figure, axes = sheet(title, text, (), len(panels), panel_height=0.85 + 0.34 * len(keys))
    for place, (axis, (heading, series)) in enumerate(zip(axes, panels, strict=True)):
        low = min(one.marks[0].interval.low for one in series)
        high = max(one.marks[0].interval.high for one in series)
        scale, unit = axis_scale(series[0].unit, max(high, -low))
        for one in series:
            _bar(axis, keys.index(one.key), one, looks[one.key.name], scale)
        name = f"{heading} ({unit})" if unit else heading
        axis.set_title("\n".join(textwrap.wrap(name + provenance_suffix(series), 38)))
        _rows(axis, [labels[key] if place % 2 == 0 else "" for key in keys])
        axis.set_xlim(left=min(0.0, 1.05 * low / scale))
        if high <= 0:  # as a difference of noisy times may be, for all series at once
            axis.set_xlim(right=0.05 * abs(low) / scale or 1.0)
    return figure


def paint_stacks(title: str, text: str, stacks: Sequence[Stack]) -> Figure:
    """Return a figure with a panel per stack and a bar per series, on one scale."""
    keys = list(dict.fromkeys(one.key for stack in stacks for one in stack.series))
    labels = row_labels(keys)
    names = list(dict.fromkeys(name for stack in stacks for name in (*stack.parts, *stack.beside)))
    entries = [Entry(label=metric_title(name), look=Look(color=PARTS[name], marker="s", line="")) for name in names]
    figure, axes = sheet(title, text, entries, len(stacks), panel_height=0.75 + 0.42 * len(keys), columns=1)
    longest = max(_length(stack, key) for stack in stacks for key in keys)
    scale, unit = axis_scale(stacks[0].series[0].unit, longest)
    for axis, stack in zip(axes, stacks, strict=True):
        for place, key in enumerate(keys):
            _stacked(axis, place, key, stack, scale)
        axis.set_title(f"{stack.heading} ({unit}){provenance_suffix(stack.series)}".strip())
        _rows(axis, [labels[key] for key in keys])
        axis.set_xlim(0, longest / scale * 1.05 or 1.0)
    return figure


def _length(stack: Stack, key: SeriesKey) -> float:
    """Return how far a bar and its error mark reach, in stored units."""
    found = [mark for some in stack.parts.values() for one in some if one.key == key for mark in one.marks[:1]]
    alone = [mark for some in stack.beside.values() for one in some if one.key == key for mark in one.marks[:1]]
    slack = max((mark.interval.high - mark.interval.estimate for mark in found), default=0)
    return max([sum(mark.interval.estimate for mark in found) + slack, *(mark.interval.high for mark in alone)])


def _stacked(axis: Any, place: int, key: SeriesKey, stack: Stack, scale: float) -> None:
    """Draw the parts one after the other; a part without an interval is an outline, for it may be noise."""
    start = 0.0
    mine = [(name, one) for name, some in stack.parts.items() for one in some if one.key == key]
    for number, (name, one) in enumerate(mine):
        spread = one.marks[0].interval
        end = start + spread.estimate / scale
        filled = {"color": PARTS[name], "alpha": 0.75} if spread.n > 1 else {"fill": False, "edgecolor": PARTS[name]}
        axis.barh([place - 0.1], [end - start], left=start, height=0.42, **filled)
        if spread.n > 1 and spread.high > 0:
            height = place - 0.1 + 0.09 * (number % 3 - 1)  # neighbouring error marks must not cover each other
            ends = [[(spread.estimate - spread.low) / scale], [(spread.high - spread.estimate) / scale]]
            axis.errorbar([end], [height], xerr=ends, color="C0", elinewidth=1, capsize=2, fmt="none")
        start = end
    for name, some in stack.beside.items():
        for one in some:
            if one.key == key and one.marks[0].interval.high > 0:
                _beside(axis, place + 0.27, one, PARTS[name], scale)


def _beside(axis: Any, place: float, one: Series, color: str, scale: float) -> None:
    spread = one.marks[0].interval
    filled = {"color": color, "alpha": 0.75} if spread.n > 1 else {"fill": False, "edgecolor": color}
    axis.barh([place], [spread.estimate / scale], height=0.14, **filled)
    if spread.n > 1:
        ends = [[(spread.estimate - spread.low) / scale], [(spread.high - spread.estimate) / scale]]
        axis.errorbar([spread.estimate / scale], [place], xerr=ends, color="C0", elinewidth=1, capsize=2, fmt="none")


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


def row_labels(keys: Sequence[SeriesKey]) -> dict[SeriesKey, str]:
    """Return what each row is called: as short as tells it from the others, and the budget, wrapped."""
    short = short_names(key.name.partition(APART)[0] for key in keys)
    found = {}
    for key in keys:
        name, _, apart = key.name.partition(APART)
        budget = "" if key.budget is None or key.name == BASELINE else f" {format_share(key.budget)}"
        found[key] = "\n".join(textwrap.wrap(short[name] + budget + (f", {apart}" if apart else ""), _WIDTH)[:3])
    return found


def _rows(axis: Any, labels: Sequence[str]) -> None:
    """Set up an axis with a row per series, from top to bottom; what is at its ends is the caller's."""
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(PLAIN)
    axis.grid(visible=False, axis="y")
    axis.set_yticks(range(len(labels)), labels)
