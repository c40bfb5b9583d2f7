"""What watches the steps of an engine: spans of time and counts; nobody, unless an engine is given an `Observer`.

One door for timelines, benchmarks and metrics, so that none of them replaces functions. The engine holds its observer;
kernels and models, which know no engine, ask for `current_observer`. A span that nobody watches costs about half a
microsecond, so whoever opens one in every layer of a decode step looks first whether the observer is `NULL`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from enum import StrEnum


class SpanKind(StrEnum):
    """What a span of time was spent on.

    Spans of one thread nest: a forward holds the model's, that holds attention's, and so on down to native calls.
    Fetches and stores run beside them, in threads of their own.
    """

    SCHEDULE = "schedule"
    """Choosing the batch and reserving its blocks."""
    PLACE = "place"
    """Taking slots and building tables for the batch."""
    FORWARD = "forward"
    """One forward, until its moves have ended."""
    MODEL = "model"
    """The model's own forward, attention inside it."""
    STAGING = "staging"
    """Ordering moves for a layer, and waiting for those that it reads."""
    WAIT = "wait"
    """Waiting for moves; at the end of a forward for its stores, then without a layer."""
    ATTEND = "attend"
    """Writing a layer's keys and values, and attention."""
    SELECT = "select"
    """Choosing what a layer reads."""
    KERNEL = "kernel"
    """One operation on blocks, by name."""
    NATIVE = "native"
    """One call of a native kernel within an operation on blocks."""
    EVICT = "evict"
    """What strategies do after a forward."""
    SAMPLE = "sample"
    """From logits to token ids."""
    FETCH = "fetch"
    """Moving from the host to the device."""
    STORE = "store"
    """Moving from the device to the host."""


class Counter(StrEnum):
    """What is counted."""

    PROMPT_TOKENS = "prompt_tokens"
    """Prompt tokens that were processed, those of caches made anew included."""
    OUTPUT_TOKENS = "output_tokens"
    """Tokens that were chosen for requests."""
    READ_BYTES = "read_bytes"
    """Bytes of the blocks or slots that decode attention reads, and of the bounds of keys that are scored."""


class _NoSpan(AbstractContextManager[None, None]):
    """Does nothing, again and again."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


NO_SPAN = _NoSpan()
"""The span of what is not watched."""


class Observer:
    """Is told what happens in the steps of an engine; this one ignores it. Derive from it and override what you want.

    Whatever an observer raises is taken for a failure of the step.
    """

    def span(self, kind: SpanKind, layer: int = -1, name: str = "") -> AbstractContextManager[None, None]:
        """Return a context manager that is entered when something begins and left when it ends, well or not.

        Args:
            kind: what it is.
            layer: in which layer; -1: in none, or whoever asks does not know.
            name: of the operation, for kernels.
        """
        return NO_SPAN

    def record(self, kind: SpanKind, layer: int, start_s: float, end_s: float, num_bytes: int) -> None:
        """Take note of a move that has ended; called by the threads of moves, beside all else.

        Args:
            kind: a fetch or a store.
            layer: in which layer.
            start_s: when it began, seconds of `time.perf_counter`.
            end_s: when it ended, likewise.
            num_bytes: how many bytes it moved.
        """

    def count(self, counter: Counter, n: int | Callable[[], int]) -> None:
        """Add to a counter.

        Args:
            counter: which.
            n: how much; a function where that is costly to work out: call it only if you want the number.
        """


NULL = Observer()
"""Ignores everything."""

_CURRENT: ContextVar[Observer] = ContextVar("kvatlas_observer", default=NULL)  # other threads see their own: nobody


def current_observer() -> Observer:
    """Return who watches the step that this thread is in; `NULL` outside of steps."""
    return _CURRENT.get()


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Let an observer be the current one of this thread until the block ends."""
    token = _CURRENT.set(observer)
    try:
        yield
    finally:
        _CURRENT.reset(token)
