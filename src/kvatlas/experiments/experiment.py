"""What an experiment is: a question that turns settings into points, and points into samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from kvatlas.experiments.lab import Lab
from kvatlas.experiments.settings import Settings
from kvatlas.records.schema import ModelRole, Point, Sample
from kvatlas.strategies.strategy import Strategy

__all__ = ["REPEATED", "Experiment", "Lab", "Settings"]

REPEATED = frozenset({"repeats", "repeat_limit_s"})
"""Settings of experiments that measure a point several times."""

_BY_ALL = frozenset(
    {"strategies", "dtype", "device", "linear_weights", "kv_memory", "host_memory", "link", "max_batched_tokens"}
    | {"seed", "time_limits"}
)


class Experiment(ABC):
    """One question."""

    name: ClassVar[str]
    question: ClassVar[str]
    role: ClassVar[ModelRole]
    own: ClassVar[frozenset[str]]
    """Settings that it reads beside those that all do."""

    def reads(self, settings: Settings) -> frozenset[str]:
        """Return the names of the settings that change what is measured; to give another one would be a mistake."""
        model = "quality_model" if self.role == "quality" else "speed_model"
        return _BY_ALL | self.own | {model}

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
