"""Values as users give them: numbers and lists of Python, numpy or torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_NO_LIST = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)


def plain(value: Any) -> Any:
    """Return the Python number that a scalar of numpy or torch stands for; anything else as it is."""
    is_scalar = getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None))
    if not is_scalar or getattr(value.dtype, "kind", None) in ("m", "M"):  # a time of numpy would become a number
        return value
    return value.item()


def is_whole(value: object) -> bool:
    """Whether a value is an int; True and False are answers, not numbers, and 3.0 is no count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: object) -> bool:
    """Whether a value holds others in an order; texts, bytes, mappings, sets and scalars do not."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, _NO_LIST)
        and getattr(value, "shape", None) != ()  # numpy and torch call a scalar iterable
    )


def listed(value: Any) -> list[Any] | None:
    """Return what a value holds as a new list, or None if it `is_list` not; an iterator is used up."""
    if not is_list(value):
        return None
    one_row = len(getattr(value, "shape", ())) == 1 and hasattr(value, "tolist")
    return list(value.tolist() if one_row else value)
