"""Figures of early-fact retention: over the context, the paired difference to the full cache, and over turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from kvatlas.reports.captions import caption
from kvatlas.reports.figures.answers import METRIC, REFERENCE_NOTE, Answers, at_x, differences, paint_answers
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.labels import BASELINE, describe, format_share
from kvatlas.reports.published import GAP_REFERENCES, RETENTION_REFERENCES, Reference
from kvatlas.reports.series import Series, Study

_TOLERANCE = 0.05


def plots(scene: Scene) -> list[Plot]:
    """Return retention and its paired difference for the fewest turns, and retention over turns if there are more."""
    siblings: dict[str, list[Study]] = defaultdict(list)
    for study in scene.studies:
        siblings[describe({name: value for name, value in study.split.items() if name != "turns"})].append(study)
    found: list[Plot | None] = []
    for place, studies in enumerate(siblings.values()):
        studies.sort(key=turns)
        suffix = scene.suffix + (f"_{place + 1}" if place else "")
        found += [*_over_context(scene.of(studies[0], suffix)), _over_turns(scene, studies, suffix)]
    return [plot for plot in found if plot is not None]


def turns(study: Study) -> int:
    """Return the number of turns of a conversation; 1 where nobody said."""
    return int(study.split.get("turns", study.rows[0].params.get("turns", 1)))


def _over_context(scene: Scene) -> list[Plot | None]:
    study = scene.study
    series = study.series(METRIC)
    if not series:
        return []
    retention = _plot(
        scene,
        f"early_fact_retention{scene.suffix}",
        "Does a fact from the start of the context survive?",
        "Higher is better. Each panel holds one budget, the kept fraction of the cache; the full cache is repeated in "
        "each as a yardstick. Every prompt is answered right or wrong.",
        _by_budget(series, RETENTION_REFERENCES),
    )
    lost = differences(study)
    if not lost:
        return [retention]
    paired = _plot(
        scene,
        f"early_fact_difference{scene.suffix}",
        "What does each strategy lose against the full cache, on the same prompts?",
        "Points of retention, strategy minus full, paired prompt by prompt. A bar that reaches the zero line is a tie.",
        _by_budget(lost, GAP_REFERENCES),
    )
    return [retention, paired]


def _over_turns(scene: Scene, studies: Sequence[Study], suffix: str) -> Plot | None:
    """Return retention over the turns of a conversation: a panel per context and budget."""
    if len(studies) < 2:
        return None
    contexts = sorted({mark.x for study in studies for one in study.series(METRIC) for mark in one.marks})
    panels = [
        Answers(heading=f"{context:,.0f} tokens, {panel.heading}", series=panel.series)
        for context in contexts
        for panel in _by_budget(
            at_x([(turns(study), one, context) for study in studies for one in study.series(METRIC)]), ()
        )
    ]
    return _plot(
        scene,
        f"early_fact_turns{suffix}",
        "Does a fact from the first turn survive a conversation?",
        "Higher is better. The fact opens the first turn and is asked for in the last; other turns with short answers "
        "stand between. One turn is a single prompt. Each panel holds one context and one budget.",
        panels,
        swept="turns",
        studies=studies,
    )


def _plot(
    scene: Scene,
    name: str,
    title: str,
    reading: str,
    panels: Sequence[Answers],
    swept: str = "context_tokens",
    studies: Sequence[Study] | None = None,
) -> Plot:
    every = list({(one.key, one.unit, one.marks): one for panel in panels for one in panel.series}.values())
    text = caption(studies or scene.study, every, scene.runs)
    looks = scene.palette.looks(one.key.name for one in every)
    note = f" {REFERENCE_NOTE}" if any(panel.references for panel in panels) else ""
    metric = "difference" if every[0].unit == "points" else METRIC
    tables: tuple[tuple[str, tuple[Series, ...]], ...] = ((metric, tuple(every)),)
    if swept == "turns":
        tables = tuple((f"{metric}: {panel.heading}", tuple(panel.series)) for panel in panels)
    return Plot(
        name=name,
        experiment=scene.study.experiment,
        title=title,
        caption=text,
        reading=reading + note,
        tables=tables,
        paint=lambda: paint_answers((title, text), panels, looks, swept),
    )


def _by_budget(series: Sequence[Series], references: Sequence[Reference]) -> list[Answers]:
    """Return a panel per budget, from small to large; the baseline joins each, and what was published for it."""
    budgets = {one.key.budget for one in series if one.key.name != BASELINE} or {None}
    return [
        Answers(
            heading=f"budget {format_share(budget)}" if budget else "no budget",
            series=[one for one in series if one.key.name == BASELINE or one.key.budget == budget],
            references=[one for one in references if _holds(one, budget)],
        )
        for budget in sorted(budgets, key=lambda budget: budget or 0.0)
    ]


def _holds(reference: Reference, budget: float | None) -> bool:
    return reference.budget is None or (budget is not None and abs(budget - reference.budget) <= _TOLERANCE)
