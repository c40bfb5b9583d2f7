"""The study's finding on early facts (arXiv:2604.05012) set against what was measured here.

The study's numbers are second-hand: a reading note of its version 2; the paper itself was not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvatlas.metrics.statistics import Interval
from kvatlas.reports.labels import BASELINE, family, format_share
from kvatlas.reports.quantities import POINTS, SHARE, format_quantity, format_range
from kvatlas.reports.series import Series, Study

Outcome = Literal["reproduced", "reproduced in part", "refuted", "not testable here"]

SOURCE = (
    "arXiv:2604.05012, as told by one reading note of its version 2; the paper itself was not seen, so the study's "
    "numbers are second-hand. It used Llama-3.1-8B on NVIDIA H100 GPUs, and H2O with a heavy-hitter ratio of 0.3."
)
STUDY_BUDGET = 0.3
STUDY_CONTEXTS = (1000, 8192)

_BUDGET_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of the study, and what the records say to it.

    Args:
        statement: the study's, in one line.
        outcome: computed from intervals; "not testable here" where the setting was not measured or they leave it open.
        evidence: the measured values it rests on.
    """

    statement: str
    outcome: Outcome
    evidence: str


def early_fact_claims(study: Study) -> list[Claim]:
    """Return the study's statements on early facts, judged by this early_fact study."""
    series = study.series("correct")
    full = next((one for one in series if one.key.name == BASELINE), None)
    h2o = _nearest([one for one in series if family(one.key.name) == "h2o"])
    infinigen = _nearest([one for one in series if family(one.key.name) == "infinigen"])
    return [
        _level("Full cache (vLLM there): 94–96 % at contexts of 1K–8K", full, (0.94, 0.96), at_budget=False),
        _level("H2O: 70–78 % at contexts of 1K–8K", h2o, (0.70, 0.78), at_budget=True),
        _loses(study, h2o),
        _widens(study, h2o),
        _level("InfiniGen: 92–94 % at contexts of 1K–8K", infinigen, (0.92, 0.94), at_budget=True),
    ]


def _nearest(series: Sequence[Series]) -> Series | None:
    """Return the series whose budget is nearest to the study's."""
    with_budget = [one for one in series if one.key.budget is not None]
    return min(with_budget, key=lambda one: abs((one.key.budget or 0) - STUDY_BUDGET), default=None)


def _level(statement: str, one: Series | None, band: tuple[float, float], *, at_budget: bool) -> Claim:
    """Compare measured shares with a band: reproduced where every interval reaches into it."""
    if one is None:
        return _untested(statement, "no such strategy was measured")
    budget = one.key.budget or 1.0
    if at_budget and abs(budget - STUDY_BUDGET) > _BUDGET_TOLERANCE:
        evidence = f"nearest budget measured is {format_share(budget)}; the study kept {format_share(STUDY_BUDGET)}"
        return _untested(statement, evidence)
    cells = {mark.x: mark.interval for mark in one.marks if STUDY_CONTEXTS[0] <= mark.x <= STUDY_CONTEXTS[1]}
    if not cells:
        evidence = "no context of 1K–8K tokens was measured"
        return _untested(statement, evidence)
    inside = Interval(low=band[0], estimate=sum(band) / 2, high=band[1], n=1)
    outcome = _outcome(cells, lambda found: found.overlaps(inside))
    return Claim(statement=statement, outcome=outcome, evidence=f"{one.key.label}: {_told(cells, SHARE)}")


def _loses(study: Study, h2o: Series | None) -> Claim:
    statement = "H2O forgets early facts that the full cache keeps"
    cells = _lost(study, h2o)
    if h2o is None or not cells:
        return _untested(statement, "no prompts answered by both h2o and full")
    evidence = f"{h2o.key.label} minus full, paired: {_told(cells, POINTS)}"
    if all(found.contains(0) for found in cells.values()):
        return _untested(statement, f"every interval contains 0; {evidence}")
    return Claim(statement=statement, outcome=_outcome(cells, lambda found: found.high < 0), evidence=evidence)


def _widens(study: Study, h2o: Series | None) -> Claim:
    """Compare the loss at the shortest and the longest context: a trend needs intervals that do not touch."""
    statement = "The gap widens with the context (given as 27 points at 4K–8K)"
    cells = _lost(study, h2o)
    if h2o is None or len(cells) < 2:
        evidence = "two contexts answered by both h2o and full are needed"
        return _untested(statement, evidence)
    short, long = cells[min(cells)], cells[max(cells)]
    evidence = f"{h2o.key.label} minus full, paired: {_told({min(cells): short, max(cells): long}, POINTS)}"
    if short.overlaps(long):
        evidence = f"the intervals of the shortest and the longest context overlap; {evidence}"
        return _untested(statement, evidence)
    return Claim(statement=statement, outcome="reproduced" if long.high < short.low else "refuted", evidence=evidence)


def _lost(study: Study, one: Series | None) -> dict[float, Interval]:
    if one is None:
        return {}
    pairs = {mark.x: study.paired("correct", one.key, mark.x) for mark in one.marks}
    return {x: found for x, found in pairs.items() if found is not None}


def _untested(statement: str, why: str) -> Claim:
    return Claim(statement=statement, outcome="not testable here", evidence=why)


def _outcome(cells: Mapping[float, Interval], holds: Callable[[Interval], bool]) -> Outcome:
    held = sum(map(holds, cells.values()))
    if held == len(cells):
        return "reproduced"
    return "reproduced in part" if held else "refuted"


def _told(cells: Mapping[float, Interval], unit: str) -> str:
    return "; ".join(
        f"{format_quantity(found.estimate, unit)} ({format_range(found, unit)}) at {x:,.0f} tokens"
        for x, found in sorted(cells.items())
    )
