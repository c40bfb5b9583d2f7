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
        instead_of: a metric that this one makes superfluous, where both are there.
        headline: whether the answer in one paragraph counts it.
    """

    experiment: str
    name: str
    metric: str
    higher_is_better: bool = False
    instead_of: str = ""
    headline: bool = True


CRITERIA = (
    Criterion(experiment="prompt_length", name="TTFT", metric="ttft"),
    Criterion(experiment="prompt_length", name="CPU time of prefill", metric="prefill_cpu", headline=False),
    Criterion(experiment="prompt_length", name="KV memory, peak of prefill", metric="kv_peak", headline=False),
    Criterion(
        experiment="prompt_length",
        name="KV memory after prefill, with sidecars",
        metric="cache_after_prefill",
        instead_of="kv_after_prefill",
    ),
    Criterion(experiment="prompt_length", name="KV memory after prefill", metric="kv_after_prefill"),
    Criterion(experiment="concurrency", name="Throughput", metric="output_throughput", higher_is_better=True),
    Criterion(
        experiment="concurrency",
        name="Throughput per CPU second",
        metric="output_throughput_cpu",
        higher_is_better=True,
        headline=False,
    ),
    Criterion(experiment="concurrency", name="KV memory, peak", metric="kv_peak"),
    Criterion(experiment="concurrency", name="Throughput per GB", metric="throughput_per_gb", higher_is_better=True),
    Criterion(experiment="early_fact", name="Retention", metric="correct", higher_is_better=True),
    Criterion(experiment="early_fact", name="KV memory after prefill", metric="kv_after_prefill", headline=False),
    Criterion(experiment="trace_replay", name="TTFT, median request", metric="ttft"),
    Criterion(experiment="trace_replay", name="TPOT, median request", metric="tpot"),
    Criterion(experiment="trace_replay", name="Goodput", metric="goodput", higher_is_better=True),
    Criterion(experiment="trace_replay", name="Throughput", metric="output_throughput", higher_is_better=True),
    Criterion(experiment="trace_replay", name="KV memory, peak", metric="kv_peak"),
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
            return f"{names} ({'equal, ' if len(self.names) > 1 else ''}n=1)"
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
    mine = [criterion for criterion in CRITERIA if criterion.experiment == study.experiment]
    covered = {criterion.instead_of for criterion in mine if study.samples(criterion.metric)}
    return [criterion for criterion in mine if criterion.metric not in covered and study.samples(criterion.metric)]


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
    """Return, for retention, who is best within the budget and what that costs against the full cache."""
    limited = {name: mark.interval for name, (key, mark) in fair.items() if key.name != BASELINE}
    if criterion.metric != "correct" or not limited or len(limited) == len(fair):
        return ""
    _, names, _ = judge(limited, criterion.higher_is_better)
    lost = study.paired(criterion.metric, fair[names[0]][0], x)
    text = f"within the budget: {listed(names)}, {format_quantity(limited[names[0]].estimate, SHARE)}"
    return (
        text
        if lost is None
        else f"{text}; {names[0]}: {format_quantity(lost.estimate, POINTS)} ({format_range(lost, POINTS)}) against full on the same prompts"
    )
