"""Bars of any sign: differences of noisy times may be negative for all series at once."""

from __future__ import annotations

import io

import pytest

from kvatlas.metrics.statistics import Interval
from kvatlas.reports.figures.bars import Stack, paint_bars, paint_stacks
from kvatlas.reports.figures.theme import Look
from kvatlas.reports.labels import SeriesKey
from kvatlas.reports.series import Mark, Series

LOOKS = {"full": Look(color="C0", marker="s", line="-"), "h2o": Look(color="C1", marker="o", line="-")}


def series(name: str, low: float, estimate: float, high: float, n: int) -> Series:
    interval = Interval(low=low, estimate=estimate, high=high, n=n)
    return Series(key=SeriesKey(name=name), unit="s", marks=(Mark(x=0, interval=interval),))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    "values", [(-0.3, -0.2, -0.1), (-0.2, -0.1, 0.0), (0.0, 0.0, 0.0), (0.1, 0.2, 0.3), (-1, 0, 1)]
)
def test_every_mark_is_inside(values: tuple[float, float, float], n: int) -> None:
    both = [series("full", *values, n), series("h2o", *values, n)]
    figure = paint_bars("title", "text", [("heading", both)], LOOKS)
    figure.savefig(io.BytesIO())
    axis = figure.axes[0]
    left, right = axis.get_xlim()
    drawn = [x for line in axis.lines for x in line.get_xdata()]
    assert left <= min(0, *drawn) and max(0, *drawn) <= right and left < right


def test_a_stack_of_nothing_has_an_axis() -> None:
    zero = [series("full", 0.0, 0.0, 0.0, 1)]
    figure = paint_stacks("title", "text", [Stack(heading="heading", parts={"attend_time": zero}, beside={})])
    assert figure.axes[0].get_xlim() == (0.0, 1.0)
