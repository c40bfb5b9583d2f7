"""Which strategy wins when: per experiment, condition and criterion, with the interval, or a tie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from kvatlas.metrics.statistics import Interval, Winner, winners
from kvatlas.records.schema import ModelRole, Provenance
from kvatlas.records.store import RecordStore
from kvatlas.reports.criteria import CRITERIA, Criterion
from kvatlas.reports.labels import BASELINE, BUDGET, NO_LINK, SeriesKey, format_share, listed, short_names, told
from kvatlas.reports.quantities import POINTS, SHARE, SHARES, format_quantity, format_range
from kvatlas.reports.series import Mark, Study
from kvatlas.reports.studies import read_studies

Verdict = Literal["winner", "tie", "n=1", "one run", "too few", "only one", "failed"]
# Below it an interval says next to nothing: of a 99th percentile of 48 samples, 37 % is left.
_LEAST_LEVEL = 0.5
_Candidates = Mapping[str, tuple[SeriesKey, Mark]]


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
            order may be noise; "one run" where all of a candidate's samples are of a single run, which comes to the
            same; "too few" where an interval covers less than half; "only one" without anyone to compare with;
            "failed" where all have lost requests.
        names: the best, and what ties with it, best estimate first.
        best: interval of the best estimate.
        level: lowest coverage among the intervals compared; below 0.95 the verdict is a hint.
        unit: unit of the intervals.
        candidates: series label -> interval, all that were compared.
        failed: series label -> ``"50 of 64 failed"``: those whose latencies are compared with nobody's.
        short: series label -> its name in as few words as tell it from all others of the experiment.
        provenance: the weakest among the candidates.
        provenances: all of them.
        best_provenance: that of the best.
        link: the emulated link, or "none"; rows of different links are never compared.
        x: the swept value; 0 where nothing is swept.
        split: what sets the condition apart beside the link and x, in words; may be "".
        budget: kept fraction at which candidates are compared, or None.
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
    provenances: frozenset[Provenance] = frozenset()
    best_provenance: Provenance = "measured"
    link: str = NO_LINK
    x: float = 0.0
    split: str = ""
    budget: float | None = None
    note: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)
    short: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict_text(self) -> str:
        """Return ``"h2o"``, ``"tie: full, h2o"`` or ``"h2o (n=1)"``: the short names, for a summary."""
        return self._told([self.short.get(name, name) for name in self.names])

    @property
    def verdict_sentence(self) -> str:
        """Return the same with whole labels, for a table that shows every number."""
        return self._told(self.names)

    def _told(self, found: Sequence[str]) -> str:
        names = listed(found)
        if self.verdict == "tie":
            return f"tie of all {len(self.names)}" if len(self.names) == len(self.candidates) > 2 else f"tie: {names}"
        if self.verdict == "n=1":
            if len(self.names) == len(self.candidates):
                return f"all {len(self.names)} equal (n=1)"
            return f"{'equal: ' if len(self.names) > 1 else ''}{names} (n=1)"
        doubts = {"too few": "too few samples", "one run": "one run", "failed": "no verdict, requests failed"}
        if self.verdict in doubts:
            return f"{names} ({doubts[self.verdict]})"
        return f"{names} (no other)" if self.verdict == "only one" else names

    @property
    def value_text(self) -> str:
        """Return the best estimate with its unit, and how it came about unless it was measured."""
        text = format_quantity(self.best.estimate, self.unit)
        return text if self.best_provenance == "measured" else f"{text} ({self.best_provenance})"

    @property
    def interval_text(self) -> str:
        """Return the interval of the best, or "n=1, no interval"."""
        return format_range(self.best, self.unit)


def winners_table(store: RecordStore) -> list[WinnerRow]:
    """Return one row per experiment, condition and criterion, from the done points of a records file."""
    return winner_rows(read_studies(store))


def winner_rows(found: Sequence[Study]) -> list[WinnerRow]:
    """Return the rows for these studies, in their order; criteria without samples have none.

    On an emulated link only what it touched is judged, where the rest was judged without one, too.
    """
    rows = [row for study in found for criterion in _criteria(study) for row in _rows(study, criterion)]
    real = {_place(row) for row in rows if row.link == NO_LINK}
    kept = [row for row in rows if row.link == NO_LINK or "emulated" in row.provenances or _place(row) not in real]
    return _shortened(kept)


def _shortened(rows: Sequence[WinnerRow]) -> list[WinnerRow]:
    """Give each row the short names of all strategies of its experiment, so that a name means one throughout."""
    labels: dict[str, dict[str, None]] = {}
    for row in rows:
        labels.setdefault(row.experiment, {}).update(dict.fromkeys([*row.candidates, *row.failed]))
    short = {experiment: short_names(found) for experiment, found in labels.items()}
    return [replace(row, short=short[row.experiment]) for row in rows]


def _place(row: WinnerRow) -> tuple[object, ...]:
    return row.experiment, row.model, row.criterion, row.x, row.split, row.budget


def _criteria(study: Study) -> list[Criterion]:
    """Return the criteria that have samples; the memory with sidecars stands in for that without."""
    mine = [one for one in CRITERIA if one.experiment == study.experiment and study.samples(one.metric)]
    covered = {"kv_after_prefill"} if any(one.metric == "cache_after_prefill" for one in mine) else set()
    return [one for one in mine if one.metric not in covered]


def _rows(study: Study, criterion: Criterion) -> Iterator[WinnerRow]:
    series = study.series(criterion.metric)
    if criterion.metric == "host_peak" and not any(mark.interval.high for one in series for mark in one.marks):
        return  # nobody used the host
    full = next((one for one in series if one.key.name == BASELINE), None)
    for x in sorted({mark.x for one in series for mark in one.marks}):
        marks = {one.key: mark for one in series if (mark := one.at(x)) is not None}
        if study.swept == BUDGET and full is not None:
            if set(marks) <= {full.key}:
                continue  # the full cache alone, at all of the cache
            marks = {full.key: full.marks[-1]} | marks  # the yardstick of every kept fraction
        for budget in _budgets(marks):
            fair = {_name(key, budget): (key, mark) for key, mark in marks.items() if _within(key, budget)}
            where = study.condition(x) + (f", budget {format_share(budget)}" if budget else "")
            yield _row(study, criterion, series[0].unit, (x, budget, where), fair)


def _budgets(marks: Mapping[SeriesKey, Mark]) -> list[float | None]:
    """Return the budgets to compare at, one table row each: equal memory, with the full cache as a yardstick."""
    budgets = {key.budget for key in marks if key.name != BASELINE}
    return sorted(budgets, key=lambda budget: budget or 0.0) or [None]


def _within(key: SeriesKey, budget: float | None) -> bool:
    return budget is None or key.name == BASELINE or key.budget == budget


def _name(key: SeriesKey, budget: float | None) -> str:
    return key.label if budget is None else told(key.name)


def _row(
    study: Study, criterion: Criterion, unit: str, place: tuple[float, float | None, str], fair: _Candidates
) -> WinnerRow:
    x, budget, where = place
    failed = {name: lost for name, (key, _) in fair.items() if (lost := study.failed(criterion.metric, key, x))}
    every_failed = len(failed) == len(fair)
    fair = fair if every_failed else {name: one for name, one in fair.items() if name not in failed}
    candidates = {name: mark.interval for name, (_, mark) in fair.items()}

    def pairs(one: str, other: str) -> Interval | None:
        return study.paired(criterion.metric, fair[one][0], x, fair[other][0])

    same_prompts = criterion.metric in SHARES
    verdict, names, level = judge(candidates, criterion.higher_is_better, pairs if same_prompts else None)
    if every_failed:
        verdict, level = "failed", 0.0
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
        provenances=frozenset(provenances),
        best_provenance=fair[names[0]][1].provenance,
        link=study.link,
        x=x,
        split=study.set_apart_on_link,
        budget=budget,
        note=_note(study, criterion, x, fair, failed),
        failed=failed,
    )


def judge(
    candidates: Mapping[str, Interval],
    higher_is_better: bool,
    pairs: Callable[[str, str], Interval | None] | None = None,
) -> tuple[Verdict, tuple[str, ...], float]:
    """Return (verdict, names, level); a single sample has no spread, so nothing beats or loses to it for sure.

    Args:
        candidates: name -> interval.
        higher_is_better: False for latencies and bytes.
        pairs: difference of two candidates on the same prompts, or None where there are none; where it is known, it
            decides whether they tie, for it sees what two intervals that overlap do not.
    """
    found = _paired(winners(candidates, higher_is_better), candidates, higher_is_better, pairs)
    if len(candidates) == 1:
        return "only one", found.names, found.level
    if min(interval.n for interval in candidates.values()) == 1:
        best = candidates[found.names[0]].estimate
        return "n=1", tuple(name for name, interval in candidates.items() if interval.estimate == best), found.level
    if any(interval.of_one_run for interval in candidates.values()):
        return "one run", found.names[:1], 0.0
    if found.level < _LEAST_LEVEL:
        return "too few", found.names[:1], found.level
    return ("tie" if found.tie else "winner"), found.names, found.level


def _paired(
    found: Winner,
    candidates: Mapping[str, Interval],
    higher_is_better: bool,
    pairs: Callable[[str, str], Interval | None] | None,
) -> Winner:
    """Return the winners with ties decided by paired differences, where there are any."""
    if pairs is None:
        return found
    best = found.names[0]
    ranked = sorted(candidates, key=lambda name: candidates[name].estimate, reverse=higher_is_better)
    names = [best]
    for name in ranked:
        if name != best:
            difference = pairs(best, name)
            if name in found.names if difference is None else difference.contains(0):
                names.append(name)
    return Winner(names=tuple(names), tie=len(names) > 1, level=found.level)


def _note(study: Study, criterion: Criterion, x: float, fair: _Candidates, failed: Mapping[str, str]) -> str:
    """Return the SLO beside a goodput, what is of one run, what lost requests; for retention, what its budget costs."""
    single = dict.fromkeys(
        f"{mark.interval.n:,} {mark.interval.of_one_run} of one run"
        for _, mark in fair.values()
        if mark.interval.of_one_run
    )
    alone = f"{' or '.join(single)}, which depend on each other" if single else ""
    lost = "; ".join(f"{name}: {count}, so its latencies are not compared" for name, count in failed.items())
    return "; ".join(part for part in (_aside(study, criterion, x, fair), alone, lost) if part)


def _aside(study: Study, criterion: Criterion, x: float, fair: _Candidates) -> str:
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
