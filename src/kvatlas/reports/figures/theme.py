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

from kvatlas.reports.labels import BASELINE, family, is_peer

_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
_LINES = ("-", "--", ":", "-.")
# The first colour is the ink: it draws the baseline. Paper: ground, axes, grid.
_LIGHT = ("#1b1f24", "#0072b2", "#d55e00", "#008f68", "#b5528a", "#b97f00", "#3a9bd9")
_DARK = ("#e6e8eb", "#4aa8e8", "#f0803c", "#2fc39a", "#dd8fbd", "#efb43d", "#8fd0f7")
_HUES = len(_LIGHT) - 1
# The first hues belong to these, whoever else is there, so that reports look alike.
_HOMES = ("h2o", "infinigen", "offload", "snapkv", "streaming_llm")
# Other systems are drawn in browns and greys, with dashes and markers of their own.
_PEER_MARKERS = ("p", "d", "8")
_LIGHT_PEERS = ("#7a5c3e", "#767d86", "#4f4a6b")
_DARK_PEERS = ("#c9a582", "#a9b1ba", "#aaa3d6")
# Hues that no strategy has, for parts of a whole and kinds of work.
_LIGHT_PARTS = ("#332288", "#88ccee", "#44aa99", "#999933", "#aa4499", "#cc6677")
_DARK_PARTS = ("#8f82e0", "#93d3f2", "#56c2ae", "#bdbd55", "#d480c6", "#e58c9a")
_LIGHT_PAPER = ("#ffffff", "#5b636d", "#dfe3e8")
_DARK_PAPER = ("#171b21", "#9aa4b0", "#2d343d")


# Part or kind of work -> its colour, the same in every figure.
PARTS = {
    **dict.fromkeys(("device_kv", "attend_time", "attention"), _LIGHT_PARTS[0]),
    **dict.fromkeys(("device_sketch", "speculate_time", "speculate"), _LIGHT_PARTS[1]),
    **dict.fromkeys(("device_staging", "wait_time", "wait"), _LIGHT_PARTS[2]),
    **dict.fromkeys(("device_sidecars", "other_time"), _LIGHT_PARTS[3]),
    **dict.fromkeys(("host_kv", "transfer_time", "fetch"), _LIGHT_PARTS[4]),
    "store": _LIGHT_PARTS[5],
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a series is drawn; ``color`` is a place in the cycle of colours, such as ``"C1"``, or a colour."""

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
        found = {family(one) for one in strategies} - {BASELINE, *_HOMES}
        return cls(families=(*_HOMES, *sorted(found, key=lambda name: (is_peer(name), name))))

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
        if is_peer(kind):
            place -= sum(not is_peer(one) for one in self.families)
            peer = _LIGHT_PEERS[place % len(_LIGHT_PEERS)]
            return Look(color=peer, marker=_PEER_MARKERS[place % len(_PEER_MARKERS)], line=":")
        color = 1 + place % _HUES
        return Look(
            color=f"C{color}",
            marker=_MARKERS[(place + 5 * variant) % len(_MARKERS)],
            line=_LINES[(variant + place // _HUES) % len(_LINES)],
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
    light = (*_LIGHT, *_LIGHT_PEERS, *_LIGHT_PARTS, *_LIGHT_PAPER)
    partners = dict(zip(light, (*_DARK, *_DARK_PEERS, *_DARK_PARTS, *_DARK_PAPER), strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: partners.get(found[0], found[0]), svg.decode()).encode()


def hue(look: Look) -> str:
    """Return the colour of a look on light paper, such as ``#0072b2``: for what is not drawn by matplotlib."""
    return _LIGHT[int(look.color[1:])] if look.color.startswith("C") else look.color


def dark_hue(look: Look) -> str:
    """Return the same on dark paper."""
    return darkened(hue(look).encode()).decode()


def slimmed(svg: bytes) -> bytes:
    """Return the drawing without what only makes it longer: comments, unused names, a thousandth of a point.

    Words stay words, so the page needs no outline of every letter; Verdana is as wide as the font they were laid
    out in, where that one is missing.
    """
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg.decode(), flags=re.DOTALL)
    text = re.sub(r"(?<![\w#.])(-?\d+\.\d{2})\d+", r"\1", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=<g) id="[^"]*"', "", text)
    text = text.replace(" font-family: 'DejaVu Sans';", "").replace(" stroke-linecap: square", "")
    text = text.replace("*{", "text{font-family: 'DejaVu Sans', Verdana, sans-serif} *{", 1)
    return re.sub(r"(?<=>)\s+(?=<)", "", re.sub(r"\s*\n\s*", " ", text)).encode()


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
        "svg.fonttype": "none",
    }
