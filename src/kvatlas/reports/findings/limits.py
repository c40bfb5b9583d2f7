"""Findings 1 and 2: how long a prompt may be, and what prefill costs in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvatlas.metrics.statistics import Interval
from kvatlas.records.schema import PointRecord
from kvatlas.reports.findings.cast import NAMES, play
from kvatlas.reports.findings.rules import Outcome, Part, coverage_note, untested
from kvatlas.reports.labels import told
from kvatlas.reports.published import REACH_FULL, REACH_MATERIALISED
from kvatlas.reports.quantities import significant
from kvatlas.reports.refusals import Refusal, refusals
from kvatlas.reports.series import Series, Study

_LINEAR = 1.5


def reach(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 1: the full cache reaches 128K tokens, a materialised score matrix ends at 10-12K."""
    ends = refusals(study, points)
    full = play(study.series("ttft"), "full")
    return [
        _reaches(study, ends, "full", "vLLM's policy takes prompts of 128K tokens", "128K tokens"),
        *(_ends_early(study, ends, full, role) for role in ("h2o", "infinigen")),
    ]


def prefill(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 2: prefill without the score matrix needs linear memory, and chunks make long prompts run."""
    ends = refusals(study, points)
    statement = "Prefill without the score matrix: less memory and time at 15K tokens"
    gain = untested(
        statement,
        "memory −85 %, latency −77 %",
        "this engine never materialises the score matrix, so there is no prefill with one to compare with",
    )
    return [gain, _linear(study), _runs_long(study, ends), _reaches(study, ends, "infinigen", _LONG, "128K tokens")]


_LONG = "InfiniGen without the score matrix takes prompts of 128K tokens"


def _reaches(study: Study, ends: Sequence[Refusal], role: str, statement: str, published: str) -> Part:
    one = play(study.series("ttft"), role)
    if one is None:
        return untested(statement, published, f"not measured here: {NAMES[role]}")
    longest, first = one.marks[-1].x, _first(ends, one)
    measured, evidence = f"ran at {longest:,.0f} tokens", _told(one, first)
    if longest >= REACH_FULL:
        return Part(
            statement=statement, published=published, outcome="reproduced", measured=measured, evidence=evidence
        )
    why = "longer prompts were not tried" if first is None else "the memory given here ends earlier"
    return Part(
        statement=statement,
        published=published,
        outcome="not testable here",
        measured=measured,
        evidence=f"{why}; {evidence}",
    )


def _ends_early(study: Study, ends: Sequence[Refusal], full: Series | None, role: str) -> Part:
    """Compare the role's limit with lengths that the full cache ran, beyond where the study's ended."""
    statement = f"{NAMES[role]} runs out of memory far earlier: its prefill materialises the score matrix"
    published = "10K to 12K tokens, vLLM 128K"
    one = play(study.series("ttft"), role)
    if one is None or full is None:
        return untested(statement, published, f"not measured here: {NAMES[role] if one is None else NAMES['full']}")
    longest, first = one.marks[-1].x, _first(ends, one)
    measured = f"ran at {longest:,.0f} tokens; the full cache at {full.marks[-1].x:,.0f}"
    if first is not None and full.marks[-1].x >= first.x:
        outcome: Outcome = "reproduced" if first.x <= 2 * REACH_MATERIALISED[1] else "reproduced in part"
        return Part(
            statement=statement,
            published=published,
            outcome=outcome,
            measured=measured,
            evidence=_told(one, first),
        )
    if longest > REACH_MATERIALISED[1] and longest >= full.marks[-1].x:
        why = "it ran wherever the full cache did, beyond 12K tokens"
        return Part(
            statement=statement,
            published=published,
            outcome="refuted",
            measured=measured,
            evidence=f"{why}; {_told(one, first)}",
        )
    return Part(
        statement=statement,
        published=published,
        outcome="not testable here",
        measured=measured,
        evidence=f"no prompt beyond 12K tokens that the full cache ran; {_told(one, first)}",
    )


def _linear(study: Study) -> Part:
    """Judge the exponent of the memory that prefill needs beside the cache, between the shortest and the longest."""
    statement = "Without the matrix, the memory of prefill is no longer quadratic in the prompt"
    published = "exponent 1, not 2"
    one = play(study.series("outside_pool_peak"), "h2o")
    if one is None or len(one.marks) < 2:
        why = "these records hold no memory outside the pool; benchmarks/prefill_memory.py measures it"
        return untested(statement, published, why)
    first, last = one.marks[0], one.marks[-1]
    octaves = math.log(last.x / first.x)
    ends = [
        math.log(last.interval.low / first.interval.high) / octaves,
        math.log(last.interval.estimate / first.interval.estimate) / octaves,
        math.log(last.interval.high / first.interval.low) / octaves,
    ]
    level = min(first.interval.level, last.interval.level)
    found = Interval(low=ends[0], estimate=ends[1], high=ends[2], n=min(first.interval.n, last.interval.n), level=level)
    outcome: Outcome = "not testable here"
    if found.n > 1 and (found.high < _LINEAR or found.low > _LINEAR):
        outcome = "reproduced" if found.high < _LINEAR else "refuted"
    where = f"{told(one.key.name)}, {first.x:,.0f} to {last.x:,.0f} tokens, {last.provenance}"
    return Part(
        statement=statement,
        published=published,
        outcome=outcome,
        measured=f"exponent {significant(found.estimate)} ({significant(found.low)} to {significant(found.high)})",
        evidence="; ".join(note for note in (where, coverage_note(found)) if note),
    )


def _runs_long(study: Study, ends: Sequence[Refusal]) -> Part:
    statement, published = "Prefill in chunks makes long prompts run under H2O", "beyond 12K tokens"
    one = play(study.series("ttft"), "h2o")
    if one is None:
        return untested(statement, published, f"not measured here: {NAMES['h2o']}")
    longest, first = one.marks[-1].x, _first(ends, one)
    outcome: Outcome
    if longest > REACH_MATERIALISED[1]:
        outcome = "reproduced"
    else:
        outcome = "refuted" if first is not None and first.x <= REACH_MATERIALISED[1] else "not testable here"
    return Part(
        statement=statement,
        published=published,
        outcome=outcome,
        measured=f"ran at {longest:,.0f} tokens",
        evidence=_told(one, first),
    )


def _first(ends: Sequence[Refusal], one: Series) -> Refusal | None:
    return next((end for end in ends if end.name == one.key.name and end.of_memory), None)


def _told(one: Series, first: Refusal | None) -> str:
    return f"{told(one.key.name)}: {first.told}" if first else f"{told(one.key.name)}: nothing was refused for memory"
