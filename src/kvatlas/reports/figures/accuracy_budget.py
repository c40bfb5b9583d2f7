"""Figures of accuracy over the kept fraction: a panel per task, and the paired difference to the full cache."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.reports.captions import caption
from kvatlas.reports.figures.answers import METRIC, REFERENCE_NOTE, Answers, differences, paint_answers
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.labels import BUDGET, describe
from kvatlas.reports.published import LOSS_REFERENCES
from kvatlas.reports.series import Study


def plots(scene: Scene) -> list[Plot]:
    """Return the share of right answers over the kept fraction, and what each strategy loses on the same prompts."""
    shown = [study for study in scene.studies if study.samples(METRIC) and study.swept == BUDGET]
    if not shown:
        return []
    share = _plot(
        scene,
        shown,
        "accuracy_by_budget",
        "How many answers stay right, as less of the cache is kept?",
        "Higher is better. The kept fraction is on a logarithmic axis. The full cache keeps everything, so it stands "
        "at 100 % only; the grey band carries its interval through. Every prompt is answered right or wrong.",
        [Answers(heading=_heading(study), series=study.series(METRIC)) for study in shown],
    )
    lost = [
        Answers(heading=_heading(study), series=found, references=LOSS_REFERENCES)
        for study in shown
        if (found := differences(study))
    ]
    if not lost:
        return [share]
    paired = _plot(
        scene,
        shown,
        "accuracy_difference",
        "What does each kept fraction lose against the full cache, on the same prompts?",
        "Points, strategy minus full, paired prompt by prompt. A bar that reaches the zero line is a tie. The study's "
        f"losses are those of six multiple-choice tasks, not of these. {REFERENCE_NOTE}",
        lost,
    )
    return [share, paired]


def _heading(study: Study) -> str:
    named = {name: study.constants[name] for name in ("task", "link") if name in study.constants}
    return describe(named | study.split) or "all prompts"


def _plot(scene: Scene, shown: Sequence[Study], name: str, title: str, reading: str, panels: Sequence[Answers]) -> Plot:
    every = [one for panel in panels for one in panel.series]
    text = caption(shown, every, scene.runs)
    looks = scene.palette.looks(one.key.name for one in every)
    metric = "difference" if name == "accuracy_difference" else METRIC
    return Plot(
        name=f"{name}{scene.suffix}",
        experiment=scene.study.experiment,
        title=title,
        caption=text,
        reading=reading,
        tables=tuple((f"{metric}: {panel.heading}", tuple(panel.series)) for panel in panels),
        paint=lambda: paint_answers((title, text), panels, looks, BUDGET),
    )
