"""Which strategy wins when: per experiment, condition and criterion, with the interval, or a tie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvatlas.metrics.statistics import Interval, winners
from kvatlas.records.schema import ModelRole, Provenance
from kvatlas.records.store import RecordStore
from kvatlas.reports.labels import BASELINE, SeriesKey, format_share, listed
from kvatlas.reports.quantities import POINTS, SHARE, format_quantity, format_range
from kvatlas.reports.series import Mark, Study, studies

Verdict = Literal["winner", "tie", "n=1", "only one"]
_Candidates = Mapping[str, tuple[SeriesKey, Mark]]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What "best" means.

    Args:
        experiment: where it is measured.
        name: in words, for a table.
        metric: what is compared, at its median or share.
        higher_is_better: False for latencies and bytes.
        short: its name in the answer of one paragraph; "" leaves it out there.
    """

    experiment: str
    name: str
    metric: str
    higher_is_better: bool = False
    short: str = ""


# experiment, name, metric, short, whether higher is better
CRITERIA = tuple(
    Criterion(experiment=experiment, name=name, metric=metric, short=short, higher_is_better=higher)
    for experiment, name, metric, short, higher in (
        ("prompt_length", "TTFT", "ttft", "TTFT", False),
        ("prompt_length", "CPU time of prefill", "prefill_cpu", "", False),
        ("prompt_length", "KV memory, peak of prefill", "kv_peak", "", False),
        (
            "prompt_length",
            "KV memory after prefill, with sidecars",
            "cache_after_prefill",
            "KV memory after prefill",
            False,
        ),
        ("prompt_length", "KV memory after prefill", "kv_after_prefill", "KV memory", False),
        ("concurrency", "Throughput", "output_throughput", "throughput", True),
        ("concurrency", "Throughput per CPU second", "output_throughput_cpu", "", True),
        ("concurrency", "KV memory, peak", "kv_peak", "peak KV memory", False),
        ("concurrency", "Throughput per GB", "throughput_per_gb", "throughput per GB", True),
        ("early_fact", "Retention", "correct", "retention", True),
        ("early_fact", "KV memory after prefill", "kv_after_prefill", "", False),
        ("trace_replay", "TTFT, median request", "ttft", "median TTFT", False),
        ("trace_replay", "TPOT, median request", "tpot", "median TPOT", False),
        ("trace_replay", "Goodput", "goodput", "goodput", True),
        ("trace_replay", "Throughput", "output_throughput", "throughput", True),
        ("trace_replay", "KV memory, peak", "kv_peak", "peak KV memory", False),
    )
)


@dataclass(frozen=True, kw_only=True)
class WinnerRow:
    """Who is best by one criterion under one condition.

    Args:
        experiment: its name.
        model: on which model.
        model_role: the model's role.
        condition: the setting in words.
        criterion: what "best" means.
        verdict: "winner"; "tie" where intervals overlap; "n=1" where a candidate has one sample, so that the
            order may be noise; "only one" without anyone to compare with.
        names: the best, and what ties with it, best estimate first.
        best: interval of the best estimate.
        level: lowest coverage among the intervals compared; below 0.95 the verdict is a hint.
        unit: unit of the intervals.
        candidates: series label -> interval, all that were compared.
        provenance: the weakest among the candidates.
        note: what else the reader should know; may be "".
    """

    experiment: str
    model: str
    model_role: ModelRole
    condition: str
    criterion: Criterion
    verdict: Verdict
    names: tuple[str, ...]
    best: Interval
    level: float
    unit: str
    candidates: Mapping[str, Interval]
    provenance: Provenance
    note: str = ""

    @property
    def verdict_text(self) -> str:
        """Return ``"h2o"``, ``"tie: full, h2o"`` or ``"h2o (n=1)"``."""
        names = listed(self.names)
        if self.verdict == "tie":
            return f"tie of all {len(self.names)}" if len(self.names) == len(self.candidates) > 2 else f"tie: {names}"
        if self.verdict == "n=1":
            if len(self.names) == len(self.candidates):
                return f"all {len(self.names)} equal (n=1)"
            return f"{'equal: ' if len(self.names) > 1 else ''}{names} (n=1)"
        return f"{names} (no other)" if self.verdict == "only one" else names

    @property
    def value_text(self) -> str:
        """Return the best estimate with its unit."""
        return format_quantity(self.best.estimate, self.unit)

    @property
    def interval_text(self) -> str:
        """Return the interval of the best, or "n=1, no interval"."""
        return format_range(self.best, self.unit)


def winners_table(store: RecordStore) -> list[WinnerRow]:
    """Return one row per experiment, condition and criterion, from the done points of a records file."""
    return winner_rows(studies(store.rows()))


def winner_rows(found: Sequence[Study]) -> list[WinnerRow]:
    """Return the rows for these studies, in their order; criteria without samples have none."""
    return [row for study in found for criterion in _criteria(study) for row in _rows(study, criterion)]


def _criteria(study: Study) -> list[Criterion]:
    """Return the criteria that have samples; the memory with sidecars stands in for that without."""
    mine = [one for one in CRITERIA if one.experiment == study.experiment and study.samples(one.metric)]
    covered = {"kv_after_prefill"} if any(one.metric == "cache_after_prefill" for one in mine) else set()
    return [one for one in mine if one.metric not in covered]


def _rows(study: Study, criterion: Criterion) -> Iterator[WinnerRow]:
    series = study.series(criterion.metric)
    for x in sorted({mark.x for one in series for mark in one.marks}):
        marks = {one.key: mark for one in series if (mark := one.at(x)) is not None}
        for budget in _budgets(marks):
            fair = {_name(key, budget): (key, mark) for key, mark in marks.items() if _within(key, budget)}
            where = study.condition(x) + (f", budget {format_share(budget)}" if budget else "")
            yield _row(study, criterion, series[0].unit, x, where, fair)


def _budgets(marks: Mapping[SeriesKey, Mark]) -> list[float | None]:
    """Return the budgets to compare at, one table row each: equal memory, with the full cache as a yardstick."""
    budgets = {key.budget for key in marks if key.name != BASELINE}
    return sorted(budgets, key=lambda budget: budget or 0.0) or [None]


def _within(key: SeriesKey, budget: float | None) -> bool:
    return budget is None or key.name == BASELINE or key.budget == budget


def _name(key: SeriesKey, budget: float | None) -> str:
    return key.label if budget is None else key.name


def _row(study: Study, criterion: Criterion, unit: str, x: float, where: str, fair: _Candidates) -> WinnerRow:
    candidates = {name: mark.interval for name, (_, mark) in fair.items()}
    verdict, names, level = judge(candidates, criterion.higher_is_better)
    provenances = {mark.provenance for _, mark in fair.values()}
    return WinnerRow(
        experiment=study.experiment,
        model=study.model,
        model_role=study.model_role,
        condition=where,
        criterion=criterion,
        verdict=verdict,
        names=names,
        best=candidates[names[0]],
        level=level,
        unit=unit,
        candidates=candidates,
        provenance=next((p for p in ("estimated", "emulated") if p in provenances), "measured"),
        note=_note(study, criterion, x, fair),
    )


def judge(candidates: Mapping[str, Interval], higher_is_better: bool) -> tuple[Verdict, tuple[str, ...], float]:
    """Return (verdict, names, level); a single sample has no spread, so nothing beats or loses to it for sure."""
    found = winners(candidates, higher_is_better)
    if len(candidates) == 1:
        return "only one", found.names, found.level
    if min(interval.n for interval in candidates.values()) == 1:
        best = candidates[found.names[0]].estimate
        return "n=1", tuple(name for name, interval in candidates.items() if interval.estimate == best), found.level
    return ("tie" if found.tie else "winner"), found.names, found.level


def _note(study: Study, criterion: Criterion, x: float, fair: _Candidates) -> str:
    """Return the SLO beside a goodput; for retention, who is best within the budget and what that costs."""
    if criterion.metric == "goodput":
        slo = study.rows[0].params.get("slo")
        return f"SLO: {slo}" if slo else ""
    limited = {name: mark.interval for name, (key, mark) in fair.items() if key.name != BASELINE}
    if criterion.metric != "correct" or not limited or len(limited) == len(fair):
        return ""
    verdict, names, _ = judge(limited, criterion.higher_is_better)
    tie = "tie: " if verdict == "tie" else ""
    text = f"within the budget: {tie}{listed(names)}, {format_quantity(limited[names[0]].estimate, SHARE)}"
    lost = study.paired(criterion.metric, fair[names[0]][0], x)
    return text if lost is None else f"{text}; {names[0]} minus full, paired: {format_range(lost, POINTS)}"
