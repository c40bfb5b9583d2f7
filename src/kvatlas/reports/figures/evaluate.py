"""Figure of lm-eval's benchmarks: accuracy per task and strategy."""

from __future__ import annotations

from kvatlas.reports.captions import caption
from kvatlas.reports.figures.bars import paint_bars
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.quantities import SHARES, title as metric_title
from kvatlas.reports.series import Study


def plots(scene: Scene) -> list[Plot]:
    """Return a figure with a panel per task and measure of accuracy."""
    panels = [
        (metric, f"{_task(study)}: {metric_title(metric).lower()}", tuple(study.series(metric)))
        for study in scene.studies
        for metric in study.metrics
        if metric in SHARES
    ]
    if not panels:
        return []
    every = [one for _, _, series in panels for one in series]
    title = "How accurate are the answers to lm-eval's tasks?"
    text = caption(scene.studies, every, scene.runs).replace("per mark", "questions per bar")
    looks = scene.palette.looks(one.key.name for one in every)
    return [
        Plot(
            name=f"benchmarks{scene.suffix}",
            experiment="evaluate",
            title=title,
            caption=text,
            reading="Longer is better. Every question counts as right or wrong. Where bars of a task overlap in their "
            "intervals, it does not tell the strategies apart.",
            tables=tuple((f"{metric}: {heading}", series) for metric, heading, series in panels),
            paint=lambda: paint_bars(title, text, [(heading, series) for _, heading, series in panels], looks),
        )
    ]


def _task(study: Study) -> str:
    return str(study.split.get("task") or study.constants.get("task") or "all tasks")
