"""What an experiment is: a question that turns settings into points, and points into samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from kvatlas.experiments.lab import Lab
from kvatlas.experiments.settings import Settings
from kvatlas.records.schema import ModelRole, Point, Sample
from kvatlas.strategies.strategy import Strategy

__all__ = ["Experiment", "Lab", "Settings"]


class Experiment(ABC):
    """One question."""

    name: ClassVar[str]
    question: ClassVar[str]
    role: ClassVar[ModelRole]

    def check(self, settings: Settings) -> None:
        """Raise a KvatlasError for settings that could not be measured, before anything is."""
        return

    def sources(self, settings: Settings) -> tuple[str | None, ...]:
        """Return the models to measure; None is the bundled one."""
        return (settings.quality_model if self.role == "quality" else settings.speed_model,)

    @abstractmethod
    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield the points to measure for a model of this name.

        Settings outside, strategies inside, cheap settings first: a sweep that ends early has compared all
        strategies at the settings it reached.
        """

    @abstractmethod
    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return the raw numbers of one point."""

    def point(self, model: str, strategy: str, **params: int | float | str) -> Point:
        """Return a point of this experiment; the strategy is written in full."""
        return Point(
            experiment=self.name,
            model=model,
            model_role=self.role,
            strategy=str(Strategy.parse(strategy)),
            params=dict(params),
        )
