"""Who plays the study's systems in our records: the full cache, H2O and InfiniGen, and ratios between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvatlas.metrics.quantiles import quotient_interval
from kvatlas.metrics.statistics import Interval
from kvatlas.reports.findings.rules import Outcome, Part, Range, coverage_note, untested
from kvatlas.reports.labels import BASELINE, family, told
from kvatlas.reports.published import BUDGET, GROWTH
from kvatlas.reports.quantities import format_quantity, significant
from kvatlas.reports.series import Mark, Series, Study

NAMES = {"full": "the full cache", "h2o": "H2O", "infinigen": "InfiniGen"}
_KEPT = re.compile(r"\b(heavy|recent|cap)=([\d.]+)")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A statement about a ratio.

    Args:
        statement: the study's, in one line.
        published: its number in words.
        metric: what is compared.
        over: the role above the line.
        under: the role below it.
        published_range: for the figure; None for an equality.
        judge: interval -> verdict.
        scale: the study's own setting, in words.
    """

    statement: str
    published: str
    metric: str
    over: str
    under: str
    judge: Callable[[Interval], Outcome]
    published_range: Range | None = None
    scale: str = ""


def play(series: Sequence[Series], role: str) -> Series | None:
    """Return the series of a role; of several, the one whose kept fraction is nearest to the study's."""
    if role == BASELINE:
        return next((one for one in series if one.key.name == BASELINE), None)
    found = [one for one in series if family(one.key.name) == role]
    return min(found, key=_distance, default=None)


def kept_fraction(name: str) -> float | None:
    """Return the share that a sentence keeps, or reads per step: heavy + recent of H2O, the cap of a speculation."""
    values = {key: float(value) for key, value in _KEPT.findall(name)}
    shares = [values[key] for key in (("cap",) if "cap" in values else ("heavy", "recent")) if key in values]
    return sum(shares) if shares and all(share <= 1 for share in shares) else None


def _distance(one: Series) -> float:
    kept = one.key.budget or kept_fraction(one.key.name)
    return abs(kept - BUDGET) if kept is not None else 1.0


def ratio_part(study: Study, ratio: Ratio) -> Part:
    """Return the verdict on a ratio between two roles, at the largest setting that both have."""
    series = study.series(ratio.metric)
    over, under = play(series, ratio.over), play(series, ratio.under)
    missing = [NAMES[role] for role, one in ((ratio.over, over), (ratio.under, under)) if one is None]
    if over is None or under is None:
        return untested(ratio.statement, ratio.published, f"not measured here: {' and '.join(missing)}")
    shared = sorted({mark.x for mark in over.marks} & {mark.x for mark in under.marks})
    if not shared:
        return untested(ratio.statement, ratio.published, "no setting that both ran")
    top, bottom = over.at(shared[-1]), under.at(shared[-1])
    assert top is not None and bottom is not None
    where = study.condition(shared[-1]) + (f" (the study: {ratio.scale})" if ratio.scale else "")
    names = f"{told(over.key.name)} over {told(under.key.name)}"
    return quotient_part(ratio, top, bottom, over.unit, f"{names}, {where}")


def growth_part(study: Study, ratio: Ratio) -> Part:
    """Return the verdict on how a role's metric grows to its largest setting, over at most the study's factor of 6."""
    one = play(study.series(ratio.metric), ratio.over)
    marks = [mark for mark in one.marks if mark.x * GROWTH >= one.marks[-1].x] if one else []
    if one is None or len(marks) < 2:
        why = f"{NAMES[ratio.over]} at two settings within a factor of {GROWTH} is needed"
        return untested(ratio.statement, ratio.published, why)
    first, last = marks[0], marks[-1]
    where = f"{study.condition(last.x)} over {study.condition(first.x)}"
    scale = f" (the study: {ratio.scale})" if ratio.scale else ""
    return quotient_part(ratio, last, first, one.unit, f"{told(one.key.name)}, {where}{scale}")


def quotient_part(ratio: Ratio, top: Mark, bottom: Mark, unit: str, names: str) -> Part:
    """Return the verdict on the quotient of two marks."""
    found = quotient_interval(top.interval, bottom.interval)
    emulated = "emulated" in (top.provenance, bottom.provenance)
    values = f"{format_quantity(top.interval.estimate, unit)} over {format_quantity(bottom.interval.estimate, unit)}"
    if found is None:
        return untested(ratio.statement, ratio.published, f"no ratio to zero: {values}; {names}")
    return Part(
        statement=ratio.statement,
        published=ratio.published,
        outcome=ratio.judge(found),
        measured=ratio_text(found, emulated=emulated),
        evidence="; ".join(note for note in (f"{names}: {values}", coverage_note(found)) if note),
        kind="ratio" if ratio.published_range else "",
        published_range=ratio.published_range,
        interval=found,
        emulated=emulated,
    )


def ratio_text(found: Interval, *, emulated: bool) -> str:
    """Return ``"0.52x (0.50 to 0.55, n = 3)"``."""
    mark = ", emulated" if emulated else ""
    if found.n == 1:
        return f"{significant(found.estimate)}x (n = 1, no interval{mark})"
    if found.of_one_run:
        return f"{significant(found.estimate)}x (one run, no interval{mark})"
    ends = f"{significant(found.low)} to {significant(found.high)}"
    return f"{significant(found.estimate)}x ({ends}, n = {found.n}{mark})"
