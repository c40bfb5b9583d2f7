"""Which figures belong to which experiment, and names that stay apart when an experiment has several studies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from kvatlas.records.schema import RunManifest
from kvatlas.reports.figures import concurrency, early_fact, prompt_length, trace_replay
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.theme import Palette
from kvatlas.reports.series import Study

_FAMILIES = {
    "prompt_length": prompt_length.plots,
    "concurrency": concurrency.plots,
    "early_fact": early_fact.plots,
    "trace_replay": trace_replay.plots,
}
_UNSAFE = re.compile(r"[^a-z0-9]+")


def all_plots(found: Sequence[Study], runs: Sequence[RunManifest]) -> list[Plot]:
    """Return every figure these studies allow; an experiment unknown here has none."""
    palette = Palette.of(row.strategy for study in found for row in study.rows)
    several = Counter(study.experiment for study in found)
    plots: list[Plot] = []
    for study in found:
        family = _FAMILIES.get(study.experiment)
        if family is not None and (study.swept or study.experiment == "trace_replay"):
            taken = {plot.name for plot in plots}
            suffix = _suffix(study) if several[study.experiment] > 1 else ""
            plots += _renamed(family(study, palette, runs, suffix), taken)
    return plots


def _suffix(study: Study) -> str:
    """Return what sets the study apart, fit for a file's name."""
    parts = [study.model, *(f"{name}_{value}" for name, value in study.split.items() if name != "slo")]
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
