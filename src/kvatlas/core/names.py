"""Look a name up, or say which name was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from kvatlas.core.errors import UnknownNameError

_FEW, _MANY = 20, 100  # names that are shown; names among which something is always a little like the one given
_COMPARED = 100  # characters; the comparison takes time in proportion to their square


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for a name that is not among ``known``: with the one meant, the whole list, or the nearest five.

    Names that differ in case alone are alike.
    """
    names = sorted(map(str, known))
    close = nearest(name, names, 1, cutoff=0.5 if len(names) <= _MANY else 0.8)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif len(names) <= _FEW:
        hint = f"known: {', '.join(names)}"
    else:
        hint = f"the nearest of {len(names):,}: {', '.join(nearest(name, names, 5))}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")


def nearest(name: str, names: Iterable[str], count: int, cutoff: float = 0.0) -> list[str]:
    """Return up to ``count`` names that are most like ``name``, best first, case left out of account.

    Args:
        name: what was written.
        names: what there is.
        count: most names.
        cutoff: how alike they must be, from 0 to 1 (equal).
    """
    written: dict[str, str] = {}
    for each in names:
        written.setdefault(each.lower(), each)
    return [written[found] for found in get_close_matches(name[:_COMPARED].lower(), written, count, cutoff)]
