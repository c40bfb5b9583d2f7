"""Where a sweep ended because something did not fit: the limit that a curve cannot show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvatlas.records.schema import PointRecord
from kvatlas.reports.series import DEFAULTS, Study


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A setting of a strategy that was refused.

    Args:
        name: the strategy's sentence.
        x: the swept value.
        reason: as recorded.
    """

    name: str
    x: float
    reason: str

    @property
    def told(self) -> str:
        """Return ``"out of memory at 32,768"``, or which other limit was met."""
        limit = "beyond the model's positions at" if "positions" in self.reason else "out of memory at"
        return f"{limit} {self.x:,.10g}"

    @property
    def of_memory(self) -> bool:
        """Whether memory was the limit, and not the positions that the model was made for."""
        return "positions" not in self.reason


def refusals(study: Study, points: Sequence[PointRecord]) -> list[Refusal]:
    """Return the refused points of a study's conditions, by strategy, small x first."""
    found = [
        Refusal(name=record.point.strategy, x=study.x_of(record.point.params), reason=record.reason)
        for record in points
        if record.status == "refused" and _belongs(study, record)
    ]
    return sorted(found, key=lambda one: (one.name, one.x))


def _belongs(study: Study, record: PointRecord) -> bool:
    point = record.point
    same = (point.experiment, point.model, point.model_role) == (study.experiment, study.model, study.model_role)
    if not same or study.swept is None or not isinstance(point.params.get(study.swept), int | float):
        return False
    # An emulated link is a condition even where it splits nothing.
    conditions = {"link": study.link} | study.split
    return all(point.params.get(name, DEFAULTS.get(name)) == value for name, value in conditions.items())
