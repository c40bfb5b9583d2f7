"""Findings 1 and 2: how long a prompt may be, and what prefill costs in memory."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.records.schema import PointRecord
from kvatlas.reports.findings.cast import NAMES, play
from kvatlas.reports.findings.rules import Outcome, Part, untested
from kvatlas.reports.labels import told
from kvatlas.reports.published import REACH_FULL, REACH_MATERIALISED
from kvatlas.reports.refusals import Refusal, refusals
from kvatlas.reports.series import Series, Study

# A published K may stand for 1,024.
_BINARY = 1.024


def reach(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 1: the full cache reaches 128K tokens, a materialised score matrix ends at 10-12K."""
    ends = refusals(study, points)
    full = play(study.series("ttft"), "full")
    return [
        _reaches(study, ends, "full", "vLLM's policy takes prompts of 128K tokens", "128K tokens"),
        *(_ends_early(study, ends, full, role) for role in ("h2o", "infinigen")),
    ]


def prefill(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 2: without the score matrix, and in chunks, long prompts run; what that saves has no test here."""
    ends = refusals(study, points)
    statement = "Prefill without the score matrix: less memory and time at 15K tokens"
    gain = untested(
        statement,
        "memory −85 %, latency −77 %",
        "this engine never materialises the score matrix, so there is no prefill with one to compare with",
        decides=False,
    )
    return [gain, _runs_long(study, ends), _reaches(study, ends, "infinigen", _LONG, "128K tokens")]


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
    if first is None:
        return untested(statement, published, f"longer prompts were not tried; {evidence}", measured=measured)
    if first.x > REACH_FULL * _BINARY:
        return untested(statement, published, f"no prompt of 128K tokens was tried; {evidence}", measured=measured)
    return Part(
        statement=statement,
        published=published,
        outcome="refuted",
        measured=measured,
        evidence=f"in the memory given here it ended earlier than the study says; {evidence}",
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
    if longest > REACH_MATERIALISED[1] * _BINARY:
        return Part(
            statement=statement,
            published=published,
            outcome="refuted",
            measured=measured,
            evidence=f"it ran beyond 12K tokens; {_told(one, first)}",
        )
    if first is not None and full.marks[-1].x >= first.x:
        outcome: Outcome = "reproduced" if first.x <= 2 * REACH_MATERIALISED[1] else "reproduced in part"
        return Part(
            statement=statement,
            published=published,
            outcome=outcome,
            measured=measured,
            evidence=_told(one, first),
        )
    return Part(
        statement=statement,
        published=published,
        outcome="not testable here",
        measured=measured,
        evidence=f"no prompt beyond 12K tokens that the full cache ran; {_told(one, first)}",
    )


def _runs_long(study: Study, ends: Sequence[Refusal]) -> Part:
    statement, published = "Prefill in chunks makes long prompts run under H2O", "beyond 12K tokens"
    one = play(study.series("ttft"), "h2o")
    if one is None:
        return untested(statement, published, f"not measured here: {NAMES['h2o']}")
    longest, first = one.marks[-1].x, _first(ends, one)
    outcome: Outcome
    if longest > REACH_MATERIALISED[1] * _BINARY:
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
