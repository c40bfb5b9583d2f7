"""The sections of the page, each a function from what was read to HTML."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from kvatlas.core.units import format_bytes
from kvatlas.records.schema import Row, RunManifest
from kvatlas.reports.captions import ROLES
from kvatlas.reports.claims import SOURCE, early_fact_claims
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.gaps import Gap, provenance_lines
from kvatlas.reports.labels import describe
from kvatlas.reports.markup import bullets, details, facts, paragraph, raw_table, section, table, text
from kvatlas.reports.quantities import format_quantity, format_range, title
from kvatlas.reports.series import Series, Study
from kvatlas.reports.winners import WinnerRow

HEADINGS = {
    "prompt_length": "Prompt length",
    "concurrency": "Concurrency",
    "early_fact": "Early facts",
    "trace_replay": "Trace replay",
}
BASELINE_NOTE = (
    "full is the paged baseline: it keeps every token in paged blocks with continuous batching. That is vLLM's policy, "
    "not vLLM; nothing here says how fast vLLM is."
)
VERDICT_NOTE = (
    "The best estimate wins; whoever's interval overlaps that of the best ties with it. n=1: a single sample has no "
    "interval, so an order may be noise. Repeats and requests: the median, between order statistics; right or wrong "
    "answers: Wilson's interval."
)
_MEASURES = ("Series", "At", "Estimate", "Interval (95 % unless said)", "n", "Method", "Provenance")

Images = Mapping[str, tuple[bytes, bytes]]


def winners_section(rows: Sequence[WinnerRow]) -> str:
    """Return the table of who wins when, grouped by experiment and criterion."""
    groups = groupby(rows, key=lambda row: (row.experiment, row.model, row.model_role))
    bodies = "".join(_group(key, list(found)) for key, found in groups)
    headings = ("Criterion", "Condition", "Best", "Value", "Interval (95 % unless said)", "Note")
    shown = raw_table("Which strategy wins when", headings, bodies, hidden=True) if bodies else ""
    notes = paragraph(VERDICT_NOTE, "small") + paragraph(BASELINE_NOTE, "small")
    return section("winners", "Which wins when", shown, notes)


def _group(key: tuple[str, str, str], rows: Sequence[WinnerRow]) -> str:
    experiment, model, role = key
    heading = f"{HEADINGS.get(experiment, experiment)}: {model} ({ROLES.get(role, role)})"
    lines = [f'<tr class="group"><th colspan="6" scope="rowgroup"><span>{text(heading)}</span></th></tr>']
    for criterion, found in groupby(rows, key=lambda row: row.criterion):
        same = list(found)
        first = f'<th rowspan="{len(same)}" scope="rowgroup">{text(criterion.name)}</th>'
        lines += [f"<tr>{first if place == 0 else ''}{_cells(row)}</tr>" for place, row in enumerate(same)]
    return f"<tbody>{''.join(lines)}</tbody>"


def _cells(row: WinnerRow) -> str:
    notes = [row.note, "" if row.provenance == "measured" else f"rests on {row.provenance} numbers"]
    kind = {"winner": "wins", "tie": "tie"}.get(row.verdict, "single")
    return (
        f'<td class="tight">{text(row.condition)}</td><td class="{kind}">{text(row.verdict_text)}</td>'
        f'<td class="tight">{text(row.value_text)}</td><td class="tight">{text(row.interval_text)}</td>'
        f"<td>{text('; '.join(note for note in notes if note))}</td>"
    )


def figure_sections(plots: Sequence[Plot], images: Images, found: Sequence[Study]) -> str:
    """Return a section per experiment with its figures, and the numbers behind them."""
    parts = []
    for experiment in dict.fromkeys(study.experiment for study in found):
        mine = [study for study in found if study.experiment == experiment]
        shown = [plot for plot in plots if plot.experiment == experiment]
        drawn = {metric for plot in shown for metric, _ in plot.tables}
        figures = "".join(_figure(plot, *images[plot.name]) for plot in shown)
        note = "" if shown else paragraph("No figure is defined for this experiment; its numbers follow.")
        others = _other_numbers(mine, drawn)
        folded = details("Numbers without a figure", others) if others and shown else others
        parts.append(section(experiment, HEADINGS.get(experiment, experiment), note, figures, folded))
    return "".join(parts)


def _figure(plot: Plot, light: bytes, dark: bytes) -> str:
    alternative = f"{plot.title} {plot.caption} The numbers are in the table below."
    image = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{text(alternative)}"></picture>'
    )
    numbers = "".join(_measures(metric, series) for metric, series in plot.tables)
    return (
        f'<figure id="{text(plot.name)}"><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{text(plot.title)}">{image}</div><figcaption>{text(plot.reading)} '
        f'<span class="repeated">{text(plot.caption)}</span></figcaption>{details("The numbers", numbers)}</figure>'
    )


def _measures(metric: str, series: Iterable[Series]) -> str:
    rows = [
        (
            one.key.label,
            f"{mark.x:,.0f}" if mark.x else "",
            format_quantity(mark.interval.estimate, one.unit),
            format_range(mark.interval, one.unit),
            mark.interval.n,
            mark.interval.method,
            mark.provenance,
        )
        for one in series
        for mark in one.marks
    ]
    return table(title(metric), _MEASURES, rows)


def _other_numbers(found: Sequence[Study], drawn: set[str]) -> str:
    parts = []
    for study in found:
        numbers = "".join(_measures(metric, study.series(metric)) for metric in study.metrics if metric not in drawn)
        setting = describe(study.constants | study.split) or "as run"
        if numbers:
            parts.append(paragraph(f"{study.model} ({ROLES[study.model_role]}): {setting}", "small") + numbers)
    return "".join(parts)


def study_section(found: Sequence[Study]) -> str:
    """Return the study's finding on early facts against the measured values."""
    mine = [study for study in found if study.experiment == "early_fact"]
    caveat = (
        "What is compared is a statement about a policy, not the paper's systems: the model here is other and far "
        "smaller, and facts are planted in filler text."
    )
    judged = [(study.model, claim) for study in mine for claim in early_fact_claims(study)]
    rows = [(claim.statement, claim.outcome, claim.evidence, model) for model, claim in judged]
    headings = ("The study says", "Here", "Measured (95 % intervals)", "Model")
    untested = paragraph("Not testable here: early facts were not measured.")
    shown = table("What it says about early facts", headings, rows, hidden=True) if rows else untested
    notes = paragraph(f"Source: {SOURCE}"), paragraph(caveat, "small")
    return section("study", "The study this reproduces", notes[0], shown, notes[1])


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
    """Return (anchor, title) of every section of the page."""
    middle = [(name, HEADINGS.get(name, name)) for name in dict.fromkeys(study.experiment for study in found)]
    last = [("study", "The study"), ("missing", "Missing"), ("provenance", "Not measured"), ("runs", "Repeat it")]
    return [("winners", "Which wins when"), *middle, *last]


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
