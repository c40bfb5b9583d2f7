"""Which figures belong to which experiment, and names that stay apart when an experiment has several studies."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from kvatlas.records.schema import PointRecord, RunManifest
from kvatlas.reports.figures import (
    accuracy_budget,
    early_fact,
    evaluate,
    model_size,
    offload_breakdown,
    sweeps,
    trace_replay,
)
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.figures.theme import Palette
from kvatlas.reports.known import swept
from kvatlas.reports.series import Study

Family = Callable[[Scene], list[Plot]]

# Drawn study by study.
_ALONE: dict[str, Family] = {**dict.fromkeys(sweeps.SWEEPS, sweeps.plots), "trace_replay": trace_replay.plots}
# Drawn with the studies of one model side by side, in panels; model_size with those of all models.
_TOGETHER: dict[str, Family] = {
    "offload_breakdown": offload_breakdown.plots,
    "accuracy_budget": accuracy_budget.plots,
    "early_fact": early_fact.plots,
    "model_size": model_size.plots,
    "evaluate": evaluate.plots,
}
_UNSAFE = re.compile(r"[^a-z0-9]+")


def all_plots(found: Sequence[Study], runs: Sequence[RunManifest], points: Sequence[PointRecord] = ()) -> list[Plot]:
    """Return every figure these studies allow; an experiment unknown here has none."""
    palette = Palette.of(
        [*(row.strategy for study in found for row in study.rows), *(record.point.strategy for record in points)]
    )
    groups: dict[tuple[object, ...], list[Study]] = defaultdict(list)
    for place, study in enumerate(found):
        groups[_group(study, place)].append(study)
    several = Counter(key[0] for key in groups)
    plots: list[Plot] = []
    for (experiment, *_), studies in groups.items():
        family = _ALONE.get(str(experiment)) or _TOGETHER.get(str(experiment))
        if family is None or _unswept(studies[0]):
            continue
        scene = Scene(
            studies=tuple(studies),
            palette=palette,
            runs=runs,
            points=points,
            suffix=_suffix(studies) if several[experiment] > 1 else "",
        )
        plots += _renamed(family(scene), {plot.name for plot in plots})
    return plots


def _group(study: Study, place: int) -> tuple[object, ...]:
    if study.experiment == "model_size":
        return study.experiment, study.model_role
    if study.experiment in _TOGETHER:
        return study.experiment, study.model, study.model_role
    return study.experiment, place


def _unswept(study: Study) -> bool:
    """Whether a figure lacks its x axis, because the records do not say the swept value everywhere."""
    return study.swept is None and swept(study.experiment) is not None


def _suffix(studies: Sequence[Study]) -> str:
    """Return what sets the studies apart, fit for a file's name."""
    parts = [studies[0].model]
    if len(studies) == 1:
        parts += [f"{name}_{value}" for name, value in studies[0].split.items() if name != "slo"]
    return "_" + _UNSAFE.sub("_", "_".join(parts).lower()).strip("_")[:80]


def _renamed(plots: Sequence[Plot], taken: set[str]) -> list[Plot]:
    """Number figures whose names are taken: two conditions may differ only in what a file name cannot say."""
    found = []
    for plot in plots:
        name, number = plot.name, 2
        while name in taken:
            name, number = f"{plot.name}_{number}", number + 1
        found.append(plot.named(name))
    return found
