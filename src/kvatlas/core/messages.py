"""Values of users and errors of others in one short line, for the texts of our own errors."""

from __future__ import annotations

import reprlib


def shown(value: object) -> str:
    """Return a value in one short line, whatever its size."""
    return " ".join(_SHORT.repr(value).split())


def told(error: Exception) -> str:
    """Return an error of another library in one short line: its kind and its text."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Short(reprlib.Repr):
    """Python refuses to print ints beyond some thousands of digits, and nobody wants to read them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a whole number of {x.bit_length()} bits"


_SHORT = _Short()
