"""The sections of the page, each a function from what was read to HTML."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

from kvatlas.core.units import format_bytes
from kvatlas.records.schema import Row, RunManifest
from kvatlas.reports.captions import ROLES
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.gaps import Gap, provenance_lines
from kvatlas.reports.known import heading
from kvatlas.reports.labels import describe
from kvatlas.reports.markup import bullets, details, facts, paragraph, section, table, text
from kvatlas.reports.quantities import format_quantity, format_range, title
from kvatlas.reports.series import Series, Study

# What only a figure can tell: raw events.
UNTOLD = frozenset({"timeline_kind", "timeline_layer", "timeline_start", "timeline_end"})
_MEASURES = ("Series", "At", "Estimate", "Interval (95 % unless said)", "n", "Method", "Provenance")

Images = Mapping[str, tuple[bytes, bytes]]


def figure_sections(plots: Sequence[Plot], images: Images, found: Sequence[Study]) -> str:
    """Return a section per experiment with its figures, and the numbers behind them."""
    parts = []
    for experiment in dict.fromkeys(study.experiment for study in found):
        mine = [study for study in found if study.experiment == experiment]
        shown = [plot for plot in plots if plot.experiment == experiment]
        drawn = {metric.partition(":")[0] for plot in shown for metric, _ in plot.tables} | UNTOLD
        figures = "".join(figure(plot, *images[plot.name]) for plot in shown)
        note = "" if shown else paragraph("No figure is defined for this experiment; its numbers follow.")
        others = _other_numbers(mine, drawn)
        folded = details("Numbers without a figure", others) if others and shown else others
        parts.append(section(experiment, heading(experiment), note, figures, folded))
    return "".join(parts)


def figure(plot: Plot, light: bytes, dark: bytes) -> str:
    """Return a figure for light and dark paper, how to read it, and its numbers."""
    alternative = f"{plot.title} {plot.caption} The numbers are in the table below."
    image = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{text(alternative)}"></picture>'
    )
    numbers = "".join(_measures(metric, series) for metric, series in plot.tables)
    folded = details("The numbers", numbers) if numbers else ""
    return (
        f'<figure id="{text(plot.name)}"><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{text(plot.title)}">{image}</div><figcaption>{text(plot.reading)} '
        f'<span class="repeated">{text(plot.caption)}</span></figcaption>{folded}</figure>'
    )


def _measures(metric: str, series: Iterable[Series]) -> str:
    rows = [
        (
            one.key.label,
            f"{mark.x:,.7g}" if mark.x else "",
            format_quantity(mark.interval.estimate, one.unit) + _marked(mark.provenance),
            format_range(mark.interval, one.unit),
            mark.interval.n,
            mark.interval.method,
            mark.provenance,
        )
        for one in series
        for mark in one.marks
    ]
    name, _, where = metric.partition(": ")
    return table(title(name) + (f": {where}" if where else ""), _MEASURES, rows)


def _marked(provenance: str) -> str:
    return "" if provenance == "measured" else f" ({provenance})"


def _other_numbers(found: Sequence[Study], drawn: set[str]) -> str:
    parts = []
    for study in found:
        numbers = "".join(_measures(metric, study.series(metric)) for metric in study.metrics if metric not in drawn)
        setting = describe(study.constants | study.split) or "as run"
        if numbers:
            parts.append(paragraph(f"{study.model} ({ROLES[study.model_role]}): {setting}", "small") + numbers)
    return "".join(parts)


def missing_section(found: Sequence[Gap]) -> str:
    """Return what has no numbers, and why."""
    rows = [(gap.experiment, gap.strategy, gap.setting, gap.status, gap.reason) for gap in found]
    headings = ("Experiment", "Strategy", "Setting", "Status", "Why")
    shown = table("Settings without numbers", headings, rows, hidden=True)
    return section("missing", "What is missing", shown if rows else paragraph("Nothing: every point finished."))


def provenance_section(rows: Sequence[Row]) -> str:
    """Return which numbers were not measured."""
    lines = provenance_lines(rows)
    if not lines:
        nothing = paragraph(f"Nothing: all {len(rows):,} numbers were measured.")
        return section("provenance", "What is not measured", nothing)
    measured = sum(row.provenance == "measured" for row in rows)
    share = paragraph(f"{measured:,} of {len(rows):,} numbers were measured on the hardware named below. The others:")
    meaning = paragraph("Estimated: by a formula. Emulated: measured on an emulated link or device.", "small")
    return section("provenance", "What is not measured", share, bullets(lines), meaning)


def runs_section(runs: Sequence[RunManifest]) -> str:
    """Return the manifest of every run."""
    return section("runs", "How to repeat it", *(_run(run) for run in runs))


def _run(run: RunManifest) -> str:
    state = {True: ", with uncommitted changes", False: "", None: ""}[run.commit_dirty]
    pairs: list[tuple[str, object]] = [
        ("Command", run.command),
        ("Commit", f"{run.commit}{state}" if run.commit else "not a checkout"),
        ("Seed", run.seed),
        ("Started", run.started_at),
        ("Hardware", _listing(run.hardware)),
        ("Versions", _listing(run.versions)),
        *((f"Model {name}", _listing(values)) for name, values in run.models.items()),
    ]
    return f"<h3>Run {text(run.run_id)}</h3>{facts(pairs)}"


def _listing(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_bytes', '')} {_value(name, value)}" for name, value in values.items())


def _value(name: str, value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format_bytes(value) if name.endswith("_bytes") else f"{value:,}"
    return "unknown" if value is None else str(value)


def contents(found: Sequence[Study]) -> list[tuple[str, str]]:
    """Return (anchor, title) of every section of the page, in its order."""
    middle = [(name, heading(name)) for name in dict.fromkeys(study.experiment for study in found)]
    last = [("missing", "Missing"), ("provenance", "Not measured"), ("runs", "Repeat it")]
    return [("winners", "Which wins when"), ("study", "The study"), *middle, *last]


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
