"""Figures of an offloading strategy's parts: memory, time of a decode step, ratios, and one step as a timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvatlas.reports.captions import caption
from kvatlas.reports.figures.bars import APART, Stack, paint_bars, paint_stacks
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.figures.theme import Look
from kvatlas.reports.figures.timeline import timeline_plot
from kvatlas.reports.labels import describe
from kvatlas.reports.quantities import title as metric_title
from kvatlas.reports.series import Series, Study

MEMORY = ("device_kv", "device_sketch", "device_staging", "device_sidecars", "host_kv")
# These add up to the step; moves run beside them.
TIME = ("attend_time", "speculate_time", "wait_time", "other_time")
MOVES = ("transfer_time",)
RATIOS = (
    "hidden_share",
    "bound_reached",
    "transfer_to_compute",
    "selected_fraction",
    "speculation_recall",
    "speculation_mass",
)


def plots(scene: Scene) -> list[Plot]:
    """Return the figures of all breakdowns of one model, side by side; an emulated link has panels of its own."""
    memory = _stacks(
        scene,
        "offload_memory",
        "Where does the memory of an offloading strategy go?",
        "Bytes of one request. Partial keys are what speculation reads instead of the keys; staging holds fetched keys "
        "and values. A part that was measured once is an outline.",
        (MEMORY, ()),
    )
    time = _stacks(
        scene,
        "offload_time",
        "Where does the time of a decode step go?",
        "Medians over decode steps, parts from left to right, so their sum may miss the median step a little; each "
        "part's error mark stands at its end. Steps of one run are not independent: intervals are too narrow. Moves "
        "between the tiers run beside compute, so they are the thin bar and are not added: what they cost is "
        "the wait.",
        (TIME, MOVES),
    )
    found = [memory, time, _ratios(scene), timeline_plot(scene)]
    return [plot for plot in found if plot is not None]


def heading(study: Study, scene: Scene) -> str:
    """Return what tells a study from its siblings; the emulated link is always named."""
    return describe(study.split) or (f"emulated link {study.link}" if study.link != "none" else "per strategy")


def _stacks(
    scene: Scene, name: str, title: str, reading: str, metrics: tuple[Sequence[str], Sequence[str]]
) -> Plot | None:
    stacks = [
        Stack(heading=heading(study, scene), parts=_series(study, metrics[0]), beside=_series(study, metrics[1]))
        for study in scene.studies
    ]
    stacks = [stack for stack in stacks if stack.parts]
    if not stacks:
        return None
    every = [one for stack in stacks for one in stack.series]
    text = caption(scene.studies, every, scene.runs).replace("per mark", "per part").replace("hollow marks", "outlines")
    tables = tuple(
        (f"{metric}: {stack.heading}", tuple(series))
        for stack in stacks
        for metric, series in (*stack.parts.items(), *stack.beside.items())
    )
    return Plot(
        name=f"{name}{scene.suffix}",
        experiment=scene.study.experiment,
        title=title,
        caption=text,
        reading=reading,
        tables=tables,
        paint=lambda: paint_stacks(title, text, stacks),
    )


def _series(study: Study, metrics: Sequence[str]) -> dict[str, list[Series]]:
    """Return metric -> series, without those that are zero throughout."""
    found = {metric: study.series(metric) for metric in metrics}
    return {
        metric: series
        for metric, series in found.items()
        if any(mark.interval.high > 0 for one in series for mark in one.marks)
    }


def _ratios(scene: Scene) -> Plot | None:
    panels = [(metric, [row for study in scene.studies for row in _rows_of(study, metric, scene)]) for metric in RATIOS]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    every = [one for _, series in panels for one in series]
    title = "How well is the transfer hidden, and how good is the speculation?"
    text = caption(scene.studies, every, scene.runs).replace("per mark", "per bar")
    looks = {one.key.name: _look(scene, one) for one in every}
    return Plot(
        name=f"offload_ratios{scene.suffix}",
        experiment=scene.study.experiment,
        title=title,
        caption=text,
        reading="Hidden share: 1 means that no move made compute wait. Bound over step: the longer of compute and "
        "moves, over the step. Recall: share of the tokens with the most attention that speculation fetched; mass: "
        "share of the exact attention that lies on what was read.",
        tables=tuple((metric, tuple(series)) for metric, series in panels),
        paint=lambda: paint_bars(title, text, [(metric_title(metric), series) for metric, series in panels], looks),
    )


def _rows_of(study: Study, metric: str, scene: Scene) -> list[Series]:
    """Return the series under names that say which study they are of, so that links stand side by side as rows."""
    apart = f"{APART}{heading(study, scene)}" if len(scene.studies) > 1 or study.link != "none" else ""
    return [replace(one, key=replace(one.key, name=f"{one.key.name}{apart}")) for one in study.series(metric)]


def _look(scene: Scene, one: Series) -> Look:
    name = one.key.name.partition(APART)[0]
    return scene.palette.looks([name])[name]
