"""Timing forms of one operation in turns: what disturbs a round disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

TURN_S = 0.03
"""Seconds that a form's turn fills with calls."""
LIMIT_S = 20.0
"""Seconds of calls after which a form has had its turns."""


@dataclass(frozen=True)
class Timing:
    """Single calls of one form.

    Args:
        walls_s: wall seconds of each call.
        cpus_s: CPU seconds per call, those of all threads of this process, turn by turn.
    """

    walls_s: list[float] = field(default_factory=list)
    cpus_s: list[float] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        """The median call."""
        return statistics.median(self.walls_s)

    @property
    def cpu_s(self) -> float:
        """The median turn."""
        return statistics.median(self.cpus_s)

    @property
    def spread_s(self) -> tuple[float, float]:
        """First and third quartile of the wall seconds."""
        if len(self.walls_s) < 2:
            return self.wall_s, self.wall_s
        low, _, high = statistics.quantiles(self.walls_s, n=4, method="inclusive")
        return low, high


def take_turns(
    forms: Mapping[str, Callable[[], object]], repeats: int, *, turn_s: float = TURN_S, limit_s: float = LIMIT_S
) -> dict[str, Timing]:
    """Return the calls of each form over ``repeats`` rounds; every round begins with another form.

    A form's turn fills ``turn_s`` with calls, at least one; a first call of each is not counted. A form takes no
    further turns once its calls have taken ``limit_s`` in all.
    """
    timings = {name: Timing() for name in forms}
    names = list(forms)
    for form in forms.values():
        form()
    for repeat in range(repeats):
        start = repeat % len(names) if names else 0
        for name in names[start:] + names[:start]:
            if sum(timings[name].walls_s) > limit_s:
                continue
            _take_turn(forms[name], timings[name], turn_s)
    return timings


def _take_turn(form: Callable[[], object], timing: Timing, turn_s: float) -> None:
    """Call for ``turn_s``, at least once. CPU time of other threads may be counted only every few milliseconds."""
    cpu, begin, calls = time.process_time(), time.perf_counter(), 0
    end = begin + turn_s
    while not calls or begin < end:
        form()
        now = time.perf_counter()
        timing.walls_s.append(now - begin)
        begin, calls = now, calls + 1
    timing.cpus_s.append((time.process_time() - cpu) / calls)
