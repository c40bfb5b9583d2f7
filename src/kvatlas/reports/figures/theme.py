"""Colours, markers and sizes: safe for colour-blind readers, on white and on dark paper.

Colours are Okabe and Ito's without yellow (invisible on white); every series also has its own marker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from cycler import cycler

from kvatlas.reports.labels import BASELINE, family

_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
_LINES = ("-", "--", ":", "-.")
# The first colour is the ink: it draws the baseline. Paper: ground, axes, grid.
_LIGHT = ("#1b1f24", "#0072b2", "#d55e00", "#008f68", "#b5528a", "#b97f00", "#3a9bd9")
_DARK = ("#e6e8eb", "#4aa8e8", "#f0803c", "#2fc39a", "#dd8fbd", "#efb43d", "#8fd0f7")
_LIGHT_PAPER = ("#ffffff", "#5b636d", "#dfe3e8")
_DARK_PAPER = ("#171b21", "#9aa4b0", "#2d343d")


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a series is drawn; ``color`` is a place in the cycle of colours, such as ``"C1"``."""

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
        """Return name -> look: colour and marker by family, the baseline in ink; line style by variant and round."""
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
        color = 1 + place % (len(_LIGHT) - 1)
        return Look(
            color=f"C{color}",
            marker=_MARKERS[(place + 5 * variant) % len(_MARKERS)],
            line=_LINES[(variant + place // (len(_LIGHT) - 1)) % len(_LINES)],
        )


@contextmanager
def themed() -> Iterator[None]:
    """Draw with these settings, whatever the user's matplotlibrc says; restores them afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_settings())
        yield


def darkened(svg: bytes) -> bytes:
    """Return the drawing with every colour exchanged for its partner on dark paper."""
    partners = dict(zip((*_LIGHT, *_LIGHT_PAPER), (*_DARK, *_DARK_PAPER), strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: partners.get(found[0], found[0]), svg.decode()).encode()


def _settings() -> dict[str, Any]:
    paper, quiet, grid = _LIGHT_PAPER
    ink = _LIGHT[0]
    return {
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "axes.edgecolor": quiet,
        "axes.labelcolor": ink,
        "axes.prop_cycle": cycler(color=_LIGHT),
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
