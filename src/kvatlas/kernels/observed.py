"""Operations on blocks tell the observer of the step what they take and what they read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import ParamSpec, TypeVar

from kvatlas.core.observer import NULL, Counter, SpanKind, current_observer
from kvatlas.kernels.pool import Entries, Part

_P = ParamSpec("_P")
_R = TypeVar("_R")


def observed(operation: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make each call of an operation a span, with its name."""
    return _observed(operation, None)


def observed_reads(reads: Callable[..., int]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that does as `observed`, and counts how many bytes a call reads.

    Args:
        reads: returns them, of the call's arguments.
    """
    return partial(_observed, reads=reads)


def _observed(operation: Callable[_P, _R], reads: Callable[..., int] | None) -> Callable[_P, _R]:
    name = operation.__name__

    @wraps(operation)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        observer = current_observer()
        if observer is NULL:
            return operation(*args, **kwargs)
        if reads is not None:
            observer.count(Counter.READ_BYTES, partial(reads, *args, **kwargs))
        with observer.span(SpanKind.KERNEL, name=name):
            return operation(*args, **kwargs)

    return run


def num_blocks(held: Part | Entries) -> int:
    """Return how many blocks hold the slots in use of all lanes; waits for the device."""
    return int((-(-held.length // held.pool.layout.block_size)).sum())
