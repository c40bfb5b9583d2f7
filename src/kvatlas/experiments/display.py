"""Show how a sweep goes: a bar for all of it, one for the experiment that runs, and what is probably left."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvatlas.core.units import format_seconds
from kvatlas.experiments.experiment import Experiment, Settings
from kvatlas.experiments.pace import Pace, seconds_left
from kvatlas.experiments.settings import time_limit
from kvatlas.records.schema import Point

Work = tuple[Experiment, list[Point]]


def short(point: Point) -> str:
    """Return a point in a few words: its strategy and what is swept."""
    first = next(iter(point.params.items()), ("", ""))
    return f"{point.strategy}, {first[0]}={first[1]}"


class Display:
    """Bars on a terminal, a line per point elsewhere; use it as a context manager.

    Args:
        console: where to.
        todo: experiments with all their points, in order.
        fresh: the same with the points to measure now.
        settings: know the time limits.
    """

    def __init__(self, console: Console, todo: Sequence[Work], fresh: Sequence[Work], settings: Settings) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
        )
        total, done = (sum(len(points) for _, points in work) for work in (todo, fresh))
        self._sweep = self._progress.add_task("all", total=total, completed=total - done, left="")
        self._one: TaskID | None = None
        self._coming = [
            (experiment, len(points), Pace(limit_s=time_limit(settings, experiment.name), total=len(new)))
            for (experiment, points), (_, new) in zip(todo, fresh, strict=True)
        ]
        self._pace = Pace(limit_s=0.0, total=0)
        self._name = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def enter(self, experiment: Experiment) -> Pace:
        """Begin the next experiment and return its pace."""
        if self._one is not None:
            self._progress.remove_task(self._one)
        _, total, self._pace = self._coming.pop(0)
        self._name = experiment.name
        self._one = self._progress.add_task(
            experiment.name, total=total, completed=total - self._pace.total, left=_limit_text(self._pace)
        )
        return self._pace

    def start(self, point: Point) -> None:
        """Show which point runs."""
        assert self._one is not None
        self._progress.update(self._one, description=f"{self._name} {short(point)}")

    def finish(self, point: Point, status: str) -> None:
        """Count a point and estimate what is left."""
        assert self._one is not None
        self._pace.done += 1
        left = seconds_left(self._pace, [pace for _, _, pace in self._coming])
        self._progress.advance(self._one)
        self._progress.update(self._sweep, advance=1, left="" if left is None else f"about {format_seconds(left)} left")
        if not self._console.is_terminal:  # a log shows no bar
            self._console.print(f"{status}: {self._name} {short(point)}", highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, soft_wrap=True)


def _limit_text(pace: Pace) -> str:
    return f"at most {format_seconds(pace.limit_s)}" if pace.limit_s != math.inf else ""
