"""Look a name up, or say which name was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from kvatlas.core.errors import UnknownNameError


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for a name that is not among ``known``, with the closest one or the whole list."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")
