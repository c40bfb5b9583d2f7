"""What is missing, and what was not measured but estimated or emulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvatlas.records.schema import Point, PointRecord, Row
from kvatlas.reports.known import KNOWN
from kvatlas.reports.labels import BASELINE, BUDGET, SeriesKey, budget_of, describe, family, is_peer
from kvatlas.reports.quantities import title
from kvatlas.reports.series import Study


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A setting without numbers.

    Args:
        experiment: its name.
        strategy: the sentence or series.
        setting: the condition in words.
        status: "failed", "refused", "in part" or "not run".
        reason: why, or what the others have that it lacks.
    """

    experiment: str
    strategy: str
    setting: str
    status: str
    reason: str


def gaps(points: Sequence[PointRecord], found: Sequence[Study]) -> list[Gap]:
    """Return failed and refused points, points that lost requests, holes of the grid, and experiments not run."""
    unfinished = [
        Gap(
            experiment=record.point.experiment,
            strategy=record.point.strategy,
            setting=describe(record.point.params),
            status=record.status,
            reason=record.reason,
        )
        for record in points
        if record.status != "done"
    ]
    tried = [record.point for record in points if record.status != "done"]
    holes = [gap for study in found for gap in _holes(study, tried)]
    lost = [gap for study in found for gap in _lost(study)]
    return [*unfinished, *lost, *holes, *_not_run({record.point.experiment for record in points})]


def provenance_lines(rows: Sequence[Row]) -> list[str]:
    """Return, per metric and strategy, how many numbers are not measured; empty where all are."""
    counts = Counter((row.provenance, row.experiment, row.metric) for row in rows if row.provenance != "measured")
    return [
        f"{title(metric)} in {experiment}: {count} {'number is' if count == 1 else 'numbers are'} {provenance}"
        for (provenance, experiment, metric), count in sorted(counts.items())
    ]


def _lost(study: Study) -> list[Gap]:
    """Return the finished points of which requests failed."""
    return [
        Gap(
            experiment=study.experiment,
            strategy=key.label,
            setting=study.condition(x),
            status="in part",
            reason=f"{lost}; its latencies are of the others, and compared with nobody's",
        )
        for key, cells in study.samples("failed_requests").items()
        for x in cells
        if (lost := study.failed("ttft", key, x))
    ]


def _holes(study: Study, tried: Sequence[Point]) -> list[Gap]:
    """Return the conditions that other series of this study have and a series lacks; those tried are listed already.

    Peers run where somebody ran them; the full cache keeps everything, so it lacks no smaller budget.
    """
    if study.swept is None:
        return []
    seen: dict[SeriesKey, set[float]] = {}
    for row in study.rows:
        if is_peer(row.strategy) or (study.swept == BUDGET and row.strategy == BASELINE):
            continue
        seen.setdefault(study.keys[row.strategy, budget_of(row.params)], set()).add(study.x_of(row.params))
    every: set[float] = set().union(*seen.values())
    missing = {key: sorted(every - xs - _tried(study, key, tried)) for key, xs in seen.items()}
    return [
        Gap(
            experiment=study.experiment,
            strategy=key.label,
            setting="; ".join(map(study.condition, xs)),
            status="not run",
            reason="other strategies have this setting",
        )
        for key, xs in missing.items()
        if xs
    ]


def _tried(study: Study, key: SeriesKey, tried: Sequence[Point]) -> set[float]:
    """Return where this series failed or was refused."""
    return {
        study.x_of(point.params)
        for point in tried
        if (point.experiment, point.model) == (study.experiment, study.model)
        and study.swept in point.params
        and family(point.strategy) == family(key.name)
        and (key.budget is None or budget_of(point.params) == key.budget)
    }


def _not_run(tried: set[str]) -> list[Gap]:
    return [
        Gap(experiment=name, strategy="all", setting="", status="not run", reason="no point of it is in the records")
        for name, known in KNOWN.items()
        if name not in tried and not known.optional
    ]
