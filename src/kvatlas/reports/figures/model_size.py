"""Figure of the model-size sweep: latency, throughput and memory over the number of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.records.schema import RunManifest
from kvatlas.reports.captions import caption
from kvatlas.reports.figures.answers import at_x
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.figures.sweep import Panel, paint_panels, titled
from kvatlas.reports.known import AXES
from kvatlas.reports.labels import describe
from kvatlas.reports.series import Series, Study

_METRICS = ("ttft", "tpot", "output_throughput", "device_peak", "weights_bytes")


def plots(scene: Scene) -> list[Plot]:
    """Return a figure per set of conditions; models without a known number of parameters are left to the tables."""
    groups: dict[str, list[tuple[float, Study]]] = {}
    for study in scene.studies:
        millions = parameters(study.model, scene.runs) / 1e6
        if millions:
            groups.setdefault(describe(study.split), []).append((millions, study))
    found = [_plot(scene, group, f"_{place + 1}" if place else "") for place, group in enumerate(groups.values())]
    return [plot for plot in found if plot is not None]


def parameters(model: str, runs: Sequence[RunManifest]) -> float:
    """Return the number of parameters that a manifest states, or 0."""
    for run in runs:
        facts = run.models.get(model, {})
        value = facts.get("parameters") or facts.get("num_parameters")
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _plot(scene: Scene, group: Sequence[tuple[float, Study]], suffix: str) -> Plot | None:
    found = [(Panel(metric=metric, log_y=True), tuple(_over_models(metric, group))) for metric in _METRICS]
    found = [(panel, series) for panel, series in found if series]
    if not found:
        return None
    every = [one for _, series in found for one in series]
    title = titled("How do latency, throughput and memory grow with the model?", group[0][1])
    text = caption([study for _, study in group], every, scene.runs)
    looks = scene.palette.looks(one.key.name for one in every)
    return Plot(
        name=f"growth_by_model_size{scene.suffix}{suffix}",
        experiment="model_size",
        title=title,
        caption=text,
        reading="Latencies and memory: lower is better; throughput: higher is better. All axes are logarithmic. Models "
        "differ in layers and heads, too, not only in size; the manifests below state them.",
        tables=tuple((panel.metric, series) for panel, series in found),
        paint=lambda: paint_panels((title, text), found, looks, AXES["parameters"]),
    )


def _over_models(metric: str, group: Sequence[tuple[float, Study]]) -> list[Series]:
    return at_x([(millions, one, one.marks[0].x) for millions, study in group for one in study.series(metric)])
