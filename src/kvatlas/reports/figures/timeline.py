"""One decode step as a timeline: what computes, waits and moves when, with prefetch beside without."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from kvatlas.reports.captions import caption
from kvatlas.reports.figures.canvas import PLAIN, Plot, sheet
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.figures.theme import PARTS
from kvatlas.reports.intervals import Samples
from kvatlas.reports.labels import NO_LINK, SeriesKey, describe, family, short_names
from kvatlas.reports.quantities import axis_scale
from kvatlas.reports.series import Study

# Code of a kind in the records -> its row. The first three are on the compute thread; moves run beside it.
_KINDS = {3: "attention", 4: "speculate", 2: "wait", 0: "fetch", 1: "store"}
_MOVES = frozenset({0, 1})
_MOST = 6
_FIELDS = ("timeline_kind", "timeline_layer", "timeline_start", "timeline_end")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that lasted, in seconds from the start of the step."""

    kind: int
    layer: int
    start_s: float
    end_s: float


def timeline_plot(scene: Scene) -> Plot | None:
    """Return the figure of every recorded step of the scene, at most six; None where none was recorded."""
    steps = [(study, key, events) for study in scene.studies for key, events in recorded(study).items()]
    if not steps:
        return None
    # The same idea with and without prefetch stands side by side.
    steps.sort(key=lambda step: (step[0].link != NO_LINK, step[0].link, -_alike(steps, step[1]), step[1].name))
    steps = steps[:_MOST]
    text = caption(scene.studies, (), scene.runs).rstrip(".") + ". One step each: no repeats, so no intervals."
    title = "When does a decode step compute, wait and move?"
    return Plot(
        name=f"offload_timeline{scene.suffix}",
        experiment=scene.study.experiment,
        title=title,
        caption=text,
        reading="Time runs to the right, from the start of one decode step; each row is a kind of work, each box one "
        "layer's share. Attention, speculation and waiting take turns on one thread; between them, unmarked, it does "
        "everything else (projections, feed-forward). Fetches (host to device) and stores (device to host) run beside "
        "it: a fetch without a wait was hidden behind compute. Panels of one link share a scale.",
        tables=(),
        paint=lambda: _paint(title, text, steps),
    )


def _alike(steps: Sequence[tuple[Study, SeriesKey, Sequence[Event]]], key: SeriesKey) -> int:
    """Return how many steps belong to the family: pairs come first, so that they stand in one row."""
    return sum(family(other.name) == family(key.name) for _, other, _ in steps)


def recorded(study: Study) -> dict[SeriesKey, list[Event]]:
    """Return series -> the events of its step, where it moved anything; an event has one index in four metrics."""
    columns = [study.samples(field) for field in _FIELDS]
    found = {}
    for key, cells in columns[0].items():
        x = max(cells)
        parts = [column.get(key, {}).get(x, {}) for column in columns]
        found[key] = _events(parts)
    return {key: events for key, events in found.items() if any(event.kind in _MOVES for event in events)}


def _events(parts: Sequence[Samples]) -> list[Event]:
    kinds, layers, starts, ends = parts
    whole = [found for found in kinds if found in layers and found in starts and found in ends]
    first_seed = min((seed for seed, _ in whole), default=0)
    return [
        Event(kind=int(kinds[one]), layer=int(layers[one]), start_s=starts[one], end_s=ends[one])
        for one in sorted(whole)
        if one[0] == first_seed and int(kinds[one]) in _KINDS
    ]


def _paint(title: str, text: str, steps: Sequence[tuple[Study, SeriesKey, Sequence[Event]]]) -> Figure:
    short = short_names(key.name for _, key, _ in steps)
    per_link = max(Counter(study.link for study, _, _ in steps).values())
    columns = per_link if per_link <= 3 else 2
    figure, axes = sheet(title, text, (), len(steps), panel_height=1.75, columns=columns)
    for place, (axis, (study, key, events)) in enumerate(zip(axes, steps, strict=True)):
        longest = max(event.end_s for other, _, events in steps for event in events if other.link == study.link)
        scale, unit = axis_scale("s", longest)
        _rows(axis, events, scale)
        axis.set_xlim(0, longest / scale * 1.02)
        axis.set_title("\n".join(textwrap.wrap(_heading(study, short[key.name]), 108 // columns)), fontsize=8.5)
        axis.set_yticks(range(len(_KINDS)), list(_KINDS.values()) if place % columns == 0 else [""] * len(_KINDS))
        if place >= len(steps) - columns:
            axis.set_xlabel(f"Time in the step ({unit})")
    return figure


def _rows(axis: Any, events: Sequence[Event], scale: float) -> None:
    for row, (kind, name) in enumerate(_KINDS.items()):
        spans = [
            (event.start_s / scale, (event.end_s - event.start_s) / scale) for event in events if event.kind == kind
        ]
        # An edge of the paper's colour tells neighbouring layers apart.
        axis.broken_barh(spans, (row - 0.36, 0.72), facecolor=PARTS[name], edgecolor="#ffffff", linewidth=0.3)
    axis.set_ylim(len(_KINDS) - 0.4, -0.6)
    axis.xaxis.set_major_formatter(PLAIN)
    axis.grid(visible=False, axis="y")


def _heading(study: Study, name: str) -> str:
    split = describe(study.split)
    link = "" if study.link == "none" or split else f"emulated link {study.link}"
    return "; ".join(part for part in (name, split or link) if part)
