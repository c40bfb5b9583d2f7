"""Panels of right answers: shares, or paired differences to the full cache, with the study's ranges beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from kvatlas.reports.figures.canvas import Entry, doubling_x, draw_lines, entries_for, provenance_suffix, sheet
from kvatlas.reports.figures.theme import Look
from kvatlas.reports.known import AXES
from kvatlas.reports.labels import BASELINE, BUDGET, family
from kvatlas.reports.published import TRUST, Reference
from kvatlas.reports.quantities import POINTS
from kvatlas.reports.series import Mark, Series, Study

METRIC = "correct"
REFERENCE_NOTE = "Shaded boxes and diamonds: what the study reports for another, far larger model (second-hand)."
_SHARE_LIMITS = (-3.0, 103.0)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One panel.

    Args:
        heading: above it.
        series: what is drawn.
        references: published ranges.
    """

    heading: str
    series: Sequence[Series]
    references: Sequence[Reference] = ()


def differences(study: Study) -> list[Series]:
    """Return, per strategy and budget, the share right minus that of the full cache on the prompts both answered."""
    found = []
    for one in study.series(METRIC):
        pairs = [(mark, study.paired(METRIC, one.key, mark.x)) for mark in one.marks if one.key.name != BASELINE]
        marks = tuple(Mark(x=mark.x, interval=lost, provenance=mark.provenance) for mark, lost in pairs if lost)
        if marks:
            found.append(Series(key=one.key, unit=POINTS, marks=marks))
    return found


def is_difference(panels: Sequence[Answers]) -> bool:
    """Whether the panels show differences to the full cache."""
    return panels[0].series[0].unit == POINTS


def paint_answers(words: tuple[str, str], panels: Sequence[Answers], looks: Mapping[str, Look], swept: str) -> Figure:
    """Return the figure: (title, caption), panels, name -> look, the param on x."""
    every = [one for panel in panels for one in panel.series]
    shown = [reference for panel in panels for reference in panel.references]
    entries = entries_for(every, looks)
    if shown:
        boxes = any(reference.x_low != reference.x_high for reference in shown)
        look = Look(color="C0", marker="s" if boxes else "D", line="")
        entries.append(Entry(label=f"{'shaded: ' if boxes else ''}the study ({TRUST})", look=look))
    columns = 3 if len(panels) > 4 else 2
    figure, axes = sheet(*words, entries, len(panels), 3.2 if len(panels) == 1 else 2.6, columns=columns)
    low, high = _limits(every, shown) if is_difference(panels) else _SHARE_LIMITS
    values = [mark.x for one in every for mark in one.marks]
    for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        draw_lines(axis, panel.series, looks)
        if is_difference(panels):
            axis.axhline(0, color="C0", linewidth=1, linestyle=":")
        axis.set_ylim(low, high)
        heading = panel.heading + provenance_suffix(panel.series)
        axis.set_title("\n".join(textwrap.wrap(heading, 48 if columns == 2 else 32)))
        if place % columns == 0:
            axis.set_ylabel("Difference to full (points)" if is_difference(panels) else "Right answers (%)")
        label = AXES[swept] if place >= len(panels) - columns else ""
        doubling_x(axis, values, label, most=6, factor=100 if swept == BUDGET else 1)
        if swept == BUDGET:
            _yardstick(axis, panel.series, looks)
        for reference in panel.references:
            _reference(axis, reference, panel.series, looks)
    return figure


def _limits(series: Sequence[Series], references: Sequence[Reference]) -> tuple[float, float]:
    lows = [mark.interval.low for one in series for mark in one.marks] + [one.low for one in references]
    highs = [mark.interval.high for one in series for mark in one.marks] + [one.high for one in references]
    return min([*lows, 0]) * 100 - 4, max([*highs, 0]) * 100 + 4


def _yardstick(axis: Any, series: Sequence[Series], looks: Mapping[str, Look]) -> None:
    """Carry the full cache, which stands at 100 % only, through all budgets as a band."""
    full = next((one for one in series if one.key.name == BASELINE and one.unit != POINTS), None)
    if full is not None:
        spread, color = full.marks[-1].interval, looks[BASELINE].color
        axis.axhspan(spread.low * 100, spread.high * 100, color=color, alpha=0.1, linewidth=0, zorder=0)
        axis.axhline(spread.estimate * 100, color=color, linewidth=0.8, alpha=0.6, zorder=1)


def _reference(axis: Any, reference: Reference, series: Sequence[Series], looks: Mapping[str, Look]) -> None:
    """Draw a published range in the strategy's colour; a point of x is a hollow diamond with its range."""
    name = next((one.key.name for one in series if family(one.key.name) == reference.family), None)
    if name is None:
        return
    color, low, high = looks[name].color, reference.low * 100, reference.high * 100
    if reference.x_low == reference.x_high:
        middle, half = (low + high) / 2, (high - low) / 2
        axis.errorbar([reference.x_low], [middle], yerr=[[half], [half]], color=color, **_DIAMOND)
    elif low == high:
        axis.plot([reference.x_low, reference.x_high], [low, low], color=color, linestyle=(0, (1, 2)), linewidth=2)
    else:
        axis.fill_between([reference.x_low, reference.x_high], low, high, color=color, alpha=0.18, linewidth=0)


def at_x(found: Sequence[tuple[float, Series, float]]) -> list[Series]:
    """Return series whose marks come from several studies: (new x, series, x in that study) for each."""
    marks: dict[tuple[object, str], list[Mark]] = {}
    keys = {}
    for x, one, inside in found:
        mark = one.at(inside)
        if mark is not None:
            marks.setdefault((one.key, one.unit), []).append(replace(mark, x=x))
            keys[one.key, one.unit] = one.key
    return [
        Series(key=key, unit=unit, marks=tuple(sorted(marks[key, unit], key=lambda mark: mark.x)))
        for key, unit in sorted(keys, key=lambda found: found[0].order)
    ]


_DIAMOND: dict[str, Any] = {
    "marker": "D",
    "markersize": 7,
    "markerfacecolor": "none",
    "linestyle": "none",
    "elinewidth": 1,
    "capsize": 4,
    "zorder": 4,
}
