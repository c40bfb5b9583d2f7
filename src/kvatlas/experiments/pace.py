"""How long a sweep takes: time limits of experiments, and an estimate of what is left that respects them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Pace:
    """How one experiment goes.

    Args:
        limit_s: seconds after its first point at which it begins no further one; ``math.inf``: never.
        total: points to measure in this run.
        clock: returns seconds.
    """

    limit_s: float
    total: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    _start_s: float | None = field(default=None)

    def begin(self) -> bool:
        """Return whether another point may begin; the first one starts the time."""
        if self._start_s is None:
            self._start_s = self.clock()
        return self.spent_s < self.limit_s or not self.done

    @property
    def spent_s(self) -> float:
        """Seconds since the first point began; 0 before."""
        return 0.0 if self._start_s is None else self.clock() - self._start_s

    @property
    def left(self) -> int:
        """Points not measured yet."""
        return self.total - self.done


def seconds_left(current: Pace, coming: Sequence[Pace]) -> float | None:
    """Return about how long a sweep still takes: the mean time of a point, cut at every limit; None: cannot be told.

    Args:
        current: the experiment that runs.
        coming: those after it; where nothing is known of their points, they are taken to be like the current one's.
    """
    per_point = current.spent_s / current.done if current.done else math.inf
    rest = [min(current.left * per_point if current.left else 0.0, max(0.0, current.limit_s - current.spent_s))]
    rest += [min(pace.left * per_point if pace.left else 0.0, pace.limit_s) for pace in coming]
    total = sum(rest)
    return total if math.isfinite(total) else None
