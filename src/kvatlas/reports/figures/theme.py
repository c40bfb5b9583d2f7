"""Colours, markers and sizes: safe for colour-blind readers, on white and on dark paper.

Colours are Okabe and Ito's without yellow (invisible on white); every series also has its own marker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from cycler import cycler

from kvatlas.reports.labels import BASELINE, family

Theme = Literal["light", "dark"]

_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
_LINES = ("-", "--", ":", "-.")
# The first colour is the ink of the paper: it draws the baseline.
_COLORS: dict[Theme, tuple[str, ...]] = {
    "light": ("#1b1f24", "#0072b2", "#d55e00", "#008f68", "#b5528a", "#b97f00", "#3a9bd9"),
    "dark": ("#e6e8eb", "#4aa8e8", "#f0803c", "#2fc39a", "#dd8fbd", "#efb43d", "#8fd0f7"),
}
_PAPER: dict[Theme, tuple[str, str, str]] = {
    "light": ("#ffffff", "#5b636d", "#dfe3e8"),
    "dark": ("#171b21", "#9aa4b0", "#2d343d"),
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a series is drawn; ``color`` is an index into the theme's colours, such as ``"C1"``."""

    color: str
    marker: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours by family, so that a strategy looks the same in every figure of a report."""

    families: tuple[str, ...]

    @classmethod
    def of(cls, strategies: Iterable[str]) -> Palette:
        """Return the palette for these sentences, in a fixed order."""
        return cls(families=tuple(sorted({family(one) for one in strategies} - {BASELINE})))

    def looks(self, names: Iterable[str]) -> dict[str, Look]:
        """Return name -> look: colour and marker by family, line style by variant; the baseline in ink."""
        found: dict[str, Look] = {}
        variants: dict[str, int] = {}
        for name in dict.fromkeys(names):
            kind = family(name)
            variant = variants[kind] = variants.get(kind, -1) + 1
            found[name] = self._look(kind, variant)
        return found

    def _look(self, kind: str, variant: int) -> Look:
        if kind == BASELINE:
            return Look(color="C0", marker="o", line="-")
        place = self.families.index(kind) if kind in self.families else 0
        color = 1 + place % (len(_COLORS["light"]) - 1)
        return Look(
            color=f"C{color}",
            marker=_MARKERS[(place + 5 * variant) % len(_MARKERS)],
            line=_LINES[variant % len(_LINES)],
        )


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Draw with the theme's settings, whatever the user's matplotlibrc says; restores them afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_settings(theme))
        yield


def _settings(theme: Theme) -> dict[str, Any]:
    paper, quiet, grid = _PAPER[theme]
    ink = _COLORS[theme][0]
    return {
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "axes.edgecolor": quiet,
        "axes.labelcolor": ink,
        "axes.prop_cycle": cycler(color=list(_COLORS[theme])),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "text.color": ink,
        "xtick.color": quiet,
        "ytick.color": quiet,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "svg.hashsalt": "kvatlas",
    }
