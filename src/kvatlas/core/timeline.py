"""What happened when within forwards: fetches and stores of another tier, waits, attention; for those who ask."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass

from kvatlas.core.observer import NO_SPAN, Observer, SpanKind

IN_FORWARDS = frozenset(
    {SpanKind.FORWARD, SpanKind.FETCH, SpanKind.STORE, SpanKind.WAIT, SpanKind.ATTEND, SpanKind.SELECT}
)
"""What a timeline notes unless told otherwise: whole forwards, their moves, and what these run beside."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One span of time.

    Args:
        kind: what happened.
        layer: in which layer; -1 for a whole forward.
        start_s: when it began, seconds of `time.perf_counter`.
        end_s: when it ended, likewise.
        num_bytes: what was moved; 0 for the others.
        name: of the operation, for kernels.
    """

    kind: SpanKind
    layer: int
    start_s: float
    end_s: float
    num_bytes: int = 0
    name: str = ""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


class Timeline(Observer):
    """Keeps events in the order in which they ended; moves are added by their own threads. What fails is left out.

    Args:
        kinds: what to note.

    Attributes:
        events: so far.
    """

    def __init__(self, kinds: Collection[SpanKind] = IN_FORWARDS) -> None:
        self.kinds = frozenset(kinds)
        self.events: list[Event] = []

    def span(self, kind: SpanKind, layer: int = -1, name: str = "") -> AbstractContextManager[None, None]:
        """Return a context manager that notes how long its block took."""
        return _Span(self, kind, layer, name) if kind in self.kinds else NO_SPAN

    def record(self, kind: SpanKind, layer: int, start_s: float, end_s: float, num_bytes: int) -> None:
        """Note a move."""
        if kind in self.kinds:
            self.events.append(Event(kind=kind, layer=layer, start_s=start_s, end_s=end_s, num_bytes=num_bytes))


class _Span(AbstractContextManager[None, None]):
    def __init__(self, timeline: Timeline, kind: SpanKind, layer: int, name: str) -> None:
        self._timeline, self._kind, self._layer, self._name = timeline, kind, layer, name

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        end_s = time.perf_counter()
        if error is None:
            event = Event(kind=self._kind, layer=self._layer, start_s=self._start_s, end_s=end_s, name=self._name)
            self._timeline.events.append(event)
