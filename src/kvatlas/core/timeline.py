"""What happened when within forwards: fetches and stores of another tier, waits, attention; for those who ask."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EventKind(StrEnum):
    """What an event is. Moves run beside the compute thread, the others are its own."""

    FETCH = "fetch"
    STORE = "store"
    WAIT = "wait"
    ATTEND = "attend"
    SELECT = "select"
    STEP = "step"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One span of time.

    Args:
        kind: what happened.
        layer: in which layer; -1 for a whole forward.
        start_s: when it began, seconds on the clock of the engine's moves.
        end_s: when it ended.
        num_bytes: what was moved; 0 for the others.
    """

    kind: EventKind
    layer: int
    start_s: float
    end_s: float
    num_bytes: int = 0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


class Timeline:
    """Events in the order in which they ended; moves are added by their own threads."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, kind: EventKind, layer: int, start_s: float, end_s: float, num_bytes: int = 0) -> None:
        """Note one event."""
        self.events.append(Event(kind=kind, layer=layer, start_s=start_s, end_s=end_s, num_bytes=num_bytes))
