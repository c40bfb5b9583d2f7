"""One self-contained page from a records file: question, answer, winners, figures, gaps, manifests.

No script, no request to anywhere: styles and figures are inside, so the file can be mailed and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvatlas.core.errors import RecordsError
from kvatlas.records.schema import PointRecord, Row, RunManifest
from kvatlas.records.store import RecordStore
from kvatlas.reports.answer import QUESTION, answers
from kvatlas.reports.captions import tiers_text
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.catalogue import all_plots
from kvatlas.reports.figures.study import study_plots
from kvatlas.reports.figures.theme import Palette, darkened
from kvatlas.reports.files import check_folder, write_files
from kvatlas.reports.findings.findings import Finding, findings
from kvatlas.reports.gaps import gaps
from kvatlas.reports.labels import is_peer
from kvatlas.reports.markup import bullets, paragraph, text
from kvatlas.reports.section_study import study_section
from kvatlas.reports.section_winners import winners_section
from kvatlas.reports.sections import (
    Images,
    contents,
    figure_sections,
    missing_section,
    provenance_section,
    runs_section,
)
from kvatlas.reports.series import Study
from kvatlas.reports.studies import studies
from kvatlas.reports.winners import winner_rows

_TITLE = "KV-cache strategies compared"
# Forbids every request a page could make; the figures and styles are inside it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Records:
    """What a report reads from a records file, once."""

    rows: Sequence[Row]
    points: Sequence[PointRecord]
    runs: Sequence[RunManifest]
    studies: Sequence[Study]


def write_report(records_path: str | Path, out_dir: str | Path) -> Path:
    """Write ``index.html`` and ``figures/<name>.png`` and ``.svg`` into a folder; returns the page's path.

    Everything is drawn before anything is written; the page moves into place last. Close a store on the
    same file first: it is opened here to read.

    Args:
        records_path: what `kvatlas characterize` wrote.
        out_dir: made if missing; other files in it are left alone.

    Raises:
        RecordsError: the file is missing, locked, not ours, or holds no points.
        OutputError: the folder cannot be written.
    """
    folder = Path(out_dir).absolute()
    check_folder(folder)
    records = read_records(records_path)
    judged = findings(records.studies, records.points)
    plots = [*study_plots(judged), *all_plots(records.studies, records.runs, records.points)]
    files, images = _drawn(plots)
    page = page_html(records, judged, plots, images)
    write_files(folder, {**files, "index.html": page.encode()})
    return folder / "index.html"


def read_records(path: str | Path) -> Records:
    """Return all that a report needs.

    Raises:
        RecordsError: the file cannot be read, or holds no points.
    """
    with RecordStore(path, mode="read") as store:
        rows, points, runs = store.rows(), store.points(), store.runs()
    if not points:
        raise RecordsError(f"records file {path} holds no points; run `kvatlas characterize` on it first")
    return Records(rows=rows, points=points, runs=runs, studies=studies(rows))


def page_html(records: Records, judged: Sequence[Finding], plots: Sequence[Plot], images: Images) -> str:
    """Return the whole page.

    Args:
        records: what was read.
        judged: the study's findings.
        plots: the figures.
        images: figure name -> SVG for light and for dark paper.
    """
    rows = winner_rows(records.studies)
    anchors = contents(records.studies)
    links = "".join(f'<li><a href="#{text(anchor)}">{text(name)}</a></li>' for anchor, name in anchors)
    main = (
        winners_section(rows, _palette(records), tiers=tiers_text(records.runs), peers=_peers(records)),
        study_section(judged, plots, images),
        figure_sections(plots, images, records.studies),
        missing_section(gaps(records.points, records.studies)),
        provenance_section(records.rows),
        runs_section(records.runs),
    )
    return (
        f"{_head()}<body><header><h1>{_TITLE}</h1>{paragraph(QUESTION, 'quiet')}"
        f'<div class="answer">{bullets(answers(rows))}</div><nav aria-label="Contents"><ul>{links}</ul></nav></header>'
        f"<main>{''.join(main)}</main><footer>{paragraph(_counted(records), 'small')}</footer></body></html>\n"
    )


def _palette(records: Records) -> Palette:
    return Palette.of(record.point.strategy for record in records.points)


def _peers(records: Records) -> bool:
    return any(is_peer(record.point.strategy) for record in records.points)


def _head() -> str:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_TITLE}</title><style>{style}</style></head>'
    )


def _counted(records: Records) -> str:
    done = sum(record.status == "done" for record in records.points)
    runs = f"{len(records.runs):,} {'run' if len(records.runs) == 1 else 'runs'}"
    return (
        f"Made by kvatlas from {len(records.rows):,} numbers of {done:,} finished points in {runs}. "
        "Every figure also lies beside this page, as PNG and SVG in figures/."
    )


def _drawn(plots: Sequence[Plot]) -> tuple[dict[str, bytes], dict[str, tuple[bytes, bytes]]]:
    """Return (files to write, images to embed)."""
    files: dict[str, bytes] = {}
    images: dict[str, tuple[bytes, bytes]] = {}
    for plot in plots:
        drawn = plot.render()
        files[f"figures/{plot.name}.png"], files[f"figures/{plot.name}.svg"] = drawn["png"], drawn["svg"]
        images[plot.name] = drawn["svg"], darkened(drawn["svg"])
    return files, images
