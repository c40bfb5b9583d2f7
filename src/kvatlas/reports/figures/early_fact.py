"""Figures of early-fact retention: a panel per budget, and the paired difference to the full cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from kvatlas.records.schema import RunManifest
from kvatlas.reports.captions import caption
from kvatlas.reports.figures.canvas import Plot, doubling_x, draw_lines, entries_for, provenance_suffix, sheet
from kvatlas.reports.figures.theme import Look, Palette
from kvatlas.reports.labels import BASELINE, format_share
from kvatlas.reports.quantities import POINTS
from kvatlas.reports.series import AXES, Mark, Series, Study

METRIC = "correct"


def plots(study: Study, palette: Palette, runs: Sequence[RunManifest], suffix: str = "") -> list[Plot]:
    """Return retention, and its paired difference where the full cache answered the same prompts."""
    series = study.series(METRIC)
    if not series:
        return []
    retention = _plot(
        study,
        f"early_fact_retention{suffix}",
        "Does a fact from the start of the context survive?",
        "Higher is better. Each panel holds one budget, the kept fraction of the cache; the full cache is repeated in "
        "each as a yardstick. Every prompt is answered right or wrong.",
        series,
        _Style(palette.looks(one.key.name for one in series), runs, difference=False),
    )
    lost = differences(study)
    if not lost:
        return [retention]
    paired = _plot(
        study,
        f"early_fact_difference{suffix}",
        "What does each strategy lose against the full cache, on the same prompts?",
        "Points of retention, strategy minus full, paired prompt by prompt. A bar that reaches the zero line is a tie.",
        lost,
        _Style(palette.looks(one.key.name for one in lost), runs, difference=True),
    )
    return [retention, paired]


def differences(study: Study) -> list[Series]:
    """Return, per strategy and budget, retention minus that of the full cache on the prompts both answered."""
    found = []
    for one in study.series(METRIC):
        pairs = [(mark, study.paired(METRIC, one.key, mark.x)) for mark in one.marks if one.key.name != BASELINE]
        marks = tuple(Mark(x=mark.x, interval=lost, provenance=mark.provenance) for mark, lost in pairs if lost)
        if marks:
            found.append(Series(key=one.key, unit=POINTS, marks=marks))
    return found


class _Style:
    """What the panels of one figure share."""

    def __init__(self, looks: Mapping[str, Look], runs: Sequence[RunManifest], *, difference: bool) -> None:
        self.looks, self.runs, self.difference = looks, runs, difference


def _plot(study: Study, name: str, title: str, reading: str, series: Sequence[Series], style: _Style) -> Plot:
    text = caption(study, series, style.runs)
    return Plot(
        name=name,
        experiment=study.experiment,
        title=title,
        caption=text,
        reading=reading,
        tables=(("difference" if style.difference else METRIC, tuple(series)),),
        paint=lambda: _paint(study, title, text, series, style),
    )


def _paint(study: Study, title: str, text: str, series: Sequence[Series], style: _Style) -> Figure:
    panels = _by_budget(series)
    figure, axes = sheet(title, text, entries_for(series, style.looks), len(panels), 3.2 if len(panels) == 1 else 2.6)
    lowest = min(mark.interval.low for one in series for mark in one.marks) * 100
    for place, (axis, (budget, shown)) in enumerate(zip(axes, panels.items(), strict=True)):
        draw_lines(axis, shown, style.looks)
        if style.difference:
            axis.axhline(0, color="C0", linewidth=1, linestyle=":")
            highest = max(mark.interval.high for one in series for mark in one.marks) * 100
            axis.set_ylim(min(lowest, 0) - 4, max(highest, 0) + 4)
        else:
            axis.set_ylim(-3, 103)
        heading = f"budget {format_share(budget)}" if budget else "no budget"
        axis.set_title(heading + provenance_suffix(shown))
        if place % 2 == 0:
            axis.set_ylabel("Difference to full (points)" if style.difference else "Early facts retained (%)")
        below = place >= len(panels) - 2
        values = [mark.x for one in series for mark in one.marks]
        doubling_x(axis, values, AXES[study.swept] if below and study.swept else "", most=5)
    return figure


def _by_budget(series: Sequence[Series]) -> dict[float | None, list[Series]]:
    """Return budget -> its series, from small to large; the baseline joins each."""
    budgets = {one.key.budget for one in series if one.key.name != BASELINE} or {None}
    order = sorted(budgets, key=lambda budget: budget or 0.0)
    return {budget: [one for one in series if one.key.name == BASELINE or one.key.budget == budget] for budget in order}
