"""Finding 8: what a smaller cache costs in accuracy, and whether early facts survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvatlas.metrics.statistics import Interval
from kvatlas.records.schema import PointRecord
from kvatlas.reports.findings.cast import NAMES, play
from kvatlas.reports.findings.rules import (
    LEAST_ANSWERS,
    TOLERANCE,
    Outcome,
    Part,
    coverage_note,
    judge_effect,
    judge_equal,
    judge_level,
    untested,
)
from kvatlas.reports.labels import BASELINE, format_share
from kvatlas.reports.published import BUDGET, CONTEXTS, EARLY_GAP, LONG_CONTEXTS, LOSS, LOSS_BUDGET, RETAINED
from kvatlas.reports.quantities import POINTS, SHARE, format_quantity, format_range
from kvatlas.reports.series import Series, Study

_EQUAL_BUDGET = 0.5
_BUDGET_TOLERANCE = 0.05
_BUDGET_FACTOR = 1.3
_ROLES = ("infinigen", "h2o")


def accuracy(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return what is lost at kept fractions of 0.5 and 0.1, on the prompts that the full cache answered, too."""
    equal = [_lost_at(study, role, _EQUAL_BUDGET, "about equal to the full cache", None) for role in _ROLES]
    words = {"infinigen": "−6 points", "h2o": "−23 and −16 points"}
    lost = [_lost_at(study, role, LOSS_BUDGET, words[role], LOSS[role]) for role in _ROLES]
    return [*lost, *equal]


def early_facts(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return the levels at a kept fraction of 0.3, whether H2O loses facts, and whether the gap widens."""
    h2o = _at_budget([one for one in study.series("correct") if one.key.budget is not None], "h2o")
    return [*(_level(study, role) for role in RETAINED), _loses(study, h2o), _gap(study, h2o), _widens(study, h2o)]


def _lost_at(study: Study, role: str, budget: float, published: str, loss: tuple[float, float] | None) -> Part:
    """Judge a loss at one kept fraction; without a published loss, whether there is none."""
    kept = format_share(budget)
    statement = f"{NAMES[role]} at {kept} kept: " + ("what is lost" if loss else "nothing is lost")
    one = play(study.series("correct"), role)
    near = [mark for mark in one.marks if max(mark.x / budget, budget / mark.x) <= _BUDGET_FACTOR] if one else []
    if one is None or not near:
        why = f"not measured here: {NAMES[role]}" if one is None else f"no kept fraction near {kept}"
        return untested(statement, published, why)
    mark = min(near, key=lambda mark: abs(mark.x - budget))
    found = study.paired("correct", one.key, mark.x)
    if found is None:
        return untested(statement, published, "no prompts answered by the full cache, too")
    outcome: Outcome
    if found.n < LEAST_ANSWERS:
        outcome = "not testable here"
    elif loss is None:
        outcome = judge_equal(found, (-TOLERANCE, TOLERANCE))
    else:
        outcome = judge_effect(found, (loss[0] - TOLERANCE, loss[1] + TOLERANCE), 0)
    return Part(
        statement=statement,
        published=published,
        outcome=outcome,
        measured=_points(found),
        evidence="; ".join(
            note
            for note in (
                f"{one.key.label}, {study.condition(mark.x)}: {_share(mark.interval)}; the difference is paired",
                coverage_note(found),
                _too_few([found]),
            )
            if note
        ),
        kind="points" if loss else "",
        published_range=loss,
        interval=found,
    )


def _level(study: Study, role: str) -> Part:
    band = RETAINED[role]
    published = f"{band[0] * 100:.0f}–{band[1] * 100:.0f} %"
    statement = f"Early facts retained by {NAMES[role]} at contexts of 1K–8K"
    series = study.series("correct")
    one = play(series, role) if role == BASELINE else _at_budget(series, role)
    if one is None:
        nearest = play([found for found in series if found.key.budget is not None], role)
        why = f"not measured here: {NAMES[role]}"
        if nearest is not None:
            kept = format_share(nearest.key.budget or 0)
            why = f"nearest budget measured is {kept}; the study kept {format_share(BUDGET)}"
        return untested(statement, published, why)
    cells = {mark.x: mark.interval for mark in one.marks if CONTEXTS[0] <= mark.x <= CONTEXTS[1]}
    if not cells:
        return untested(statement, published, "no context of 1K–8K tokens was measured")
    longest, every = cells[max(cells)], list(cells.values())
    outcome = judge_level(every, (band[0] - TOLERANCE, band[1] + TOLERANCE))
    why = _too_few(every)
    if outcome == "not testable here" and not why:
        why = "too few samples: an interval reaches across an end of the widened range"
    return Part(
        statement=statement,
        published=published,
        outcome=outcome,
        measured=_told(cells, SHARE),
        evidence="; ".join(note for note in (one.key.label, why) if note),
        kind="share",
        published_range=band,
        interval=longest,
    )


def _at_budget(series: Sequence[Series], role: str) -> Series | None:
    """Return the role's series at the study's kept fraction, or None."""
    one = play(series, role)
    return one if one is not None and abs((one.key.budget or 0) - BUDGET) <= _BUDGET_TOLERANCE else None


def _loses(study: Study, h2o: Series | None) -> Part:
    statement = "H2O forgets early facts that the full cache keeps"
    cells = _lost(study, h2o)
    if h2o is None or not cells:
        return untested(statement, "", "no prompts answered by both H2O, near the study's budget, and the full cache")
    outcome: Outcome = "not testable here"
    if not all(found.contains(0) for found in cells.values()):
        held = sum(found.high < 0 for found in cells.values())
        outcome = "reproduced" if held == len(cells) else "reproduced in part" if held else "refuted"
    return Part(
        statement=statement,
        published="",
        outcome=outcome,
        measured=_told(cells, POINTS),
        evidence=f"{h2o.key.label} minus full, paired",
    )


def _gap(study: Study, h2o: Series | None) -> Part:
    statement, published = "H2O's gap at contexts of 4K–8K", "−27 points"
    cells = {x: found for x, found in _lost(study, h2o).items() if LONG_CONTEXTS[0] <= x <= LONG_CONTEXTS[1]}
    if h2o is None or not cells:
        return untested(statement, published, "no context of 4K–8K tokens was answered by both")
    found = cells[max(cells)]
    outcome: Outcome = "not testable here"
    if found.n >= LEAST_ANSWERS:
        outcome = judge_effect(found, (EARLY_GAP - TOLERANCE, EARLY_GAP + TOLERANCE), 0)
    where = f"{h2o.key.label} minus full, paired, {study.condition(max(cells))}"
    return Part(
        statement=statement,
        published=published,
        outcome=outcome,
        measured=_points(found),
        evidence="; ".join(note for note in (where, _too_few([found])) if note),
        kind="points",
        published_range=(EARLY_GAP, EARLY_GAP),
        interval=found,
    )


def _widens(study: Study, h2o: Series | None) -> Part:
    """Compare the loss at the shortest and the longest context: a trend needs intervals that do not touch."""
    statement, published = "The gap widens with the context", "to −27 points at 4K–8K"
    cells = _lost(study, h2o)
    if h2o is None or len(cells) < 2:
        return untested(statement, published, "two contexts answered by both are needed")
    ends = {x: cells[x] for x in (min(cells), max(cells))}
    short, long = ends[min(ends)], ends[max(ends)]
    evidence = f"{h2o.key.label} minus full, paired"
    outcome: Outcome = "reproduced" if long.high < short.low else "refuted"
    if short.overlaps(long):
        outcome, evidence = "not testable here", f"the two intervals overlap; {evidence}"
    return Part(
        statement=statement, published=published, outcome=outcome, measured=_told(ends, POINTS), evidence=evidence
    )


def _lost(study: Study, one: Series | None) -> dict[float, Interval]:
    if one is None:
        return {}
    pairs = {mark.x: study.paired("correct", one.key, mark.x) for mark in one.marks}
    return {x: found for x, found in pairs.items() if found is not None}


def _too_few(found: Sequence[Interval]) -> str:
    least = min(one.n for one in found)
    return f"too few samples: {least} answers, {LEAST_ANSWERS} wanted" if least < LEAST_ANSWERS else ""


def _points(found: Interval) -> str:
    return f"{format_quantity(found.estimate, POINTS)} ({format_range(found, POINTS)}, n = {found.n})"


def _share(found: Interval) -> str:
    return f"{format_quantity(found.estimate, SHARE)} ({format_range(found, SHARE)}, n = {found.n})"


def _told(cells: Mapping[float, Interval], unit: str) -> str:
    return "; ".join(
        f"{format_quantity(found.estimate, unit)} ({format_range(found, unit)}, n = {found.n}) at {x:,.0f} tokens"
        for x, found in sorted(cells.items())
    )
