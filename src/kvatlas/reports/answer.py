"""The answer in one paragraph: only what follows from the winners' table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby

from kvatlas.metrics.statistics import LEVEL
from kvatlas.reports.known import KNOWN
from kvatlas.reports.labels import NO_LINK, listed, named_family, short_names
from kvatlas.reports.winners import WinnerRow

QUESTION = (
    "Which strategy for the KV cache is best on this machine: at which load, by which measure, and at what loss of "
    "quality? Strategies are compared only within one experiment, model and setting."
)


def answer(rows: Sequence[WinnerRow]) -> str:
    """Return the answer as one paragraph."""
    return " ".join(answers(rows))


def answers(rows: Sequence[WinnerRow]) -> list[str]:
    """Return a sentence per experiment, model and link: who won, what tied, and what single samples cannot tell."""
    if not rows:
        return ["No point finished, so there is nothing to compare."]
    shown = [row for row in rows if row.criterion.short]
    groups = groupby(shown, key=lambda row: (row.experiment, "" if row.experiment == "model_size" else row.model))
    sentences = [
        _sentence([row for row in mine if row.link == link])
        for mine in (list(found) for _, found in groups)
        for link in dict.fromkeys(row.link for row in mine)
    ]
    return [sentence for sentence in [*sentences, *closing(rows)] if sentence]


def closing(rows: Sequence[WinnerRow]) -> list[str]:
    """Return what holds for all verdicts together: that nobody wins everything, and how many are hints."""
    if not rows:
        return ["No point finished, so there is nothing to compare."]
    return [sentence for sentence in (_overall([row for row in rows if row.criterion.short]), _hint(rows)) if sentence]


def _sentence(rows: Sequence[WinnerRow]) -> str:
    groups: dict[str, list[WinnerRow]] = defaultdict(list)
    for row in rows:
        groups[row.criterion.short].append(row)
    parts = [part for short, found in groups.items() for part in _parts(short, found)]
    single = [_single(short, found) for short, found in groups.items() if all(row.verdict == "n=1" for row in found)]
    if single:
        parts.append(f"no verdict on {listed(single)}, with one sample each")
    runs = [_single(short, found) for short, found in groups.items() if all(row.verdict == "one run" for row in found)]
    if runs:
        parts.append(f"no verdict on {listed(runs)}, with one run each")
    parts += _lost(groups)
    alone = [short for short, found in groups.items() if all(row.verdict == "only one" for row in found)]
    if alone:
        parts.append(f"nothing to compare {listed(rows[0].names)} with by {listed(alone)}")
    known = KNOWN[rows[0].experiment]
    count = max(map(len, groups.values()))
    emulated = "" if rows[0].link == NO_LINK else f", on an emulated link of {rows[0].link}"
    place = known.one if count == 1 else known.several.format(count)
    return f"{place}{emulated}: {'; '.join(parts)}." if parts else ""


def _parts(short: str, rows: Sequence[WinnerRow]) -> list[str]:
    """Return ``"lowest TTFT with full (3 of 4)"`` and ``"ties in TTFT (1 of 4)"``."""
    extreme = "highest" if rows[0].criterion.higher_is_better else "lowest"
    wins = Counter(row.names[0] for row in rows if row.verdict == "winner")
    ties = [row for row in rows if row.verdict == "tie"]
    parts = [f"{extreme} {short} with {short_name(name, rows)}{_of(count, rows)}" for name, count in wins.most_common()]
    if ties:
        always = sorted(set.intersection(*(set(row.names) for row in ties)))
        everyone = all(len(row.names) == len(row.candidates) for row in ties)
        among = (
            "" if everyone or not always else f": {listed(short_name(name, rows) for name in always)} among the best"
        )
        kind = "all tie" if everyone else "a tie" if len(ties) == 1 else "ties"
        parts.append(f"{kind} in {short}{_of(len(ties), rows)}{among}")
    return parts


def _lost(groups: dict[str, list[WinnerRow]]) -> list[str]:
    """Return who lost requests, the most of all settings, so that nobody takes its silence for a defeat."""
    every = [row for found in groups.values() for row in found]
    names = dict.fromkeys(name for row in every for name in row.failed)
    return [
        f"no latencies compared of {short_name(name, every)} "
        f"({listed(dict.fromkeys(row.failed[name] for row in every if name in row.failed))})"
        for name in names
    ]


def _single(short: str, rows: Sequence[WinnerRow]) -> str:
    """Return the criterion, and who was ahead wherever it was measured."""
    always = sorted(set.intersection(*(set(row.names) for row in rows)))
    if not always or all(len(row.names) == len(row.candidates) for row in rows):
        return short
    extreme = "highest" if rows[0].criterion.higher_is_better else "lowest"
    return f"{short} ({extreme} with {listed(short_name(name, rows) for name in always)})"


def _of(count: int, rows: Sequence[WinnerRow]) -> str:
    return "" if len(rows) == 1 else f" ({count} of {len(rows)})"


def short_name(name: str, rows: Iterable[WinnerRow]) -> str:
    """Return the strategy without its numbers where that names only one."""
    return short_names(other for row in rows for other in (*row.candidates, *row.failed))[name]


def _overall(rows: Sequence[WinnerRow]) -> str:
    """Say that nobody wins everything, where at least two conditions or measures have different winners."""
    winners = {named_family(row.names[0]) for row in rows if row.verdict == "winner"}
    return "No strategy wins by every measure." if len(winners) > 1 else ""


def _hint(rows: Sequence[WinnerRow]) -> str:
    weak = [row for row in rows if row.verdict in ("winner", "tie") and row.level < LEVEL]
    if not weak:
        return ""
    least = f"{min(row.level for row in weak):.0%}"
    return f"{len(weak)} of the verdicts rest on too few samples for 95 % (coverage from {least}): hints only."
