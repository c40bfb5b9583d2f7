"""The eight findings in the study's order, each with the function that judges it and the records it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from kvatlas.records.schema import PointRecord
from kvatlas.reports.findings import limits, load, quality
from kvatlas.reports.findings.rules import Outcome, Part, together
from kvatlas.reports.labels import LINK, NO_LINK, describe
from kvatlas.reports.series import Study

Judge = Callable[[Study, Sequence[PointRecord]], list[Part]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A finding's statements against one study of the records.

    Args:
        where: experiment, model and conditions in words.
        link: the emulated link, or "none".
        apart: what tells the study from its siblings, the link left out; may be "".
        parts: the statements.
    """

    where: str
    link: str
    apart: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding of the study.

    Args:
        number: 1 to 8.
        title: in a few words.
        says: what the study says.
        judged: against each study of the records; empty where none was measured.
        experiments: where it would be measured.
    """

    number: int
    title: str
    says: str
    judged: tuple[Judged, ...]
    experiments: tuple[str, ...]

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """Return link -> verdict: what rests on an emulated link is never judged together with what does not."""
        links = list(dict.fromkeys(one.link for one in self.judged))
        found = {
            link: together(
                [part.outcome for one in self.judged if one.link == link for part in one.parts if part.decides]
            )
            for link in links
        }
        return found or {NO_LINK: "not testable here"}


# title, what the study says, experiment -> judge
FINDINGS: tuple[tuple[str, str, dict[str, Judge]], ...] = (
    (
        "Reach of a prompt",
        "vLLM takes prompts of 128K tokens. H2O and InfiniGen run out of memory at about 10K to 12K: they materialise "
        "the score matrix, which grows with the square of the prompt.",
        {"prompt_length": limits.reach},
    ),
    (
        "Prefill without the score matrix",
        "At 15K tokens, prefill memory falls by 85 % and its time by 77 %. InfiniGen then reaches 128K; H2O needs "
        "chunks, and its sums then miss attention between chunks.",
        {"prompt_length": limits.prefill},
    ),
    (
        "Device memory under load",
        "From 16 to 96 requests H2O needs roughly half of vLLM's device memory, at best 70 % less; InfiniGen is near "
        "H2O.",
        {"concurrency_memory": load.device_memory},
    ),
    (
        "Host memory under load",
        "InfiniGen needs more than 100 GB of host memory at 96 requests, at least 2.5 times the others.",
        {"concurrency_memory": load.host_memory},
    ),
    (
        "Decode throughput",
        "H2O peaks like vLLM, InfiniGen is about ten times slower. Per GB of device memory H2O gives about three times "
        "vLLM's throughput.",
        {"decode_throughput": load.throughput},
    ),
    (
        "Request latency",
        "vLLM stays at about 20 s, H2O grows mildly, InfiniGen reaches up to 14 times vLLM at 96 requests.",
        {"request_latency": load.latency},
    ),
    (
        "Output length",
        "For 8,192 output tokens after a prompt of 10K, InfiniGen takes about 17 times vLLM's time and H2O about three "
        "times: fetches are not hidden behind compute.",
        {"output_length": load.long_output},
    ),
    (
        "Accuracy and early facts",
        "At half of the cache nothing is lost. At 0.1 InfiniGen loses 6 points, H2O 23 and 16 on two tasks. Early "
        "facts at 0.3: vLLM 94 to 96 %, InfiniGen 92 to 94 %, H2O 70 to 78 %, the gap widening with the context.",
        {"accuracy_budget": quality.accuracy, "early_fact": quality.early_facts},
    ),
)


def findings(found: Sequence[Study], points: Sequence[PointRecord]) -> list[Finding]:
    """Return all eight, judged against every study of their experiments.

    On an emulated link a finding is judged again only where the link touched one of its numbers.
    """
    return [
        Finding(
            number=number,
            title=title,
            says=says,
            judged=_against(found, judges, points),
            experiments=tuple(judges),
        )
        for number, (title, says, judges) in enumerate(FINDINGS, start=1)
    ]


def _against(found: Sequence[Study], judges: Mapping[str, Judge], points: Sequence[PointRecord]) -> tuple[Judged, ...]:
    every = [
        _judged(study, judges[study.experiment], points)
        for study in found
        if study.experiment in judges and study.swept
    ]
    real = any(one.link == NO_LINK for one in every)
    return tuple(one for one in every if one.link == NO_LINK or not real or any(part.emulated for part in one.parts))


def _judged(study: Study, judge: Judge, points: Sequence[PointRecord]) -> Judged:
    return Judged(where=_where(study), link=study.link, apart=_apart(study), parts=tuple(judge(study, points)))


def _apart(study: Study) -> str:
    named = {name: study.constants[name] for name in ("task",) if name in study.constants} | study.split
    return describe({name: value for name, value in named.items() if name != LINK})


def verdicts_text(found: Sequence[Finding]) -> str:
    """Return ``"3 reproduced, 1 refuted, 4 not testable here"``, those on an emulated link counted apart."""
    parts = []
    for emulated in (False, True):
        counts = Counter(
            outcome for one in found for link, outcome in one.outcomes.items() if (link != NO_LINK) == emulated
        )
        words = ", ".join(f"{counts[outcome]} {outcome}" for outcome in get_args(Outcome) if counts[outcome])
        if words:
            parts.append(f"on an emulated link {words}" if emulated else words)
    return "; ".join(parts)


def _where(study: Study) -> str:
    named = {name: study.constants[name] for name in ("task", "link") if name in study.constants}
    return ", ".join(part for part in (study.experiment, study.model, describe(named | study.split)) if part)
