"""``kvatlas report``: a records file as a page, and its winners in the terminal. Measures nothing, loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvatlas.cli.options import DEFAULT_RECORDS, DEFAULT_REPORT, Records, examples

if TYPE_CHECKING:
    from kvatlas.reports.winners import WinnerRow


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("report", epilog=examples("kvatlas report", "kvatlas report --records out/demo.duckdb --out out/demo"))(
        report
    )


def report(
    records: Records = DEFAULT_RECORDS,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the page.")] = DEFAULT_REPORT,
) -> None:
    """Print which strategy wins when, and write a page with every figure."""
    from kvatlas.records.store import RecordStore
    from kvatlas.reports.answer import closing
    from kvatlas.reports.findings.findings import findings, verdicts_text
    from kvatlas.reports.page import write_report
    from kvatlas.reports.studies import read_studies
    from kvatlas.reports.winners import winner_rows

    page = write_report(records, out)
    with RecordStore(records, mode="read") as store:
        studies, points = read_studies(store), store.points()
    rows = winner_rows(studies)
    console = Console()
    shown = [row for row in rows if row.criterion.short]
    for (experiment, model, link), study in groupby(shown, key=lambda row: (row.experiment, row.model, row.link)):
        emulated = "" if link == "none" else f", emulated link {link}"
        console.rule(f"[bold]{escape(experiment)}[/] on {escape(model)}{escape(emulated)}", align="left")
        console.print(_table(list(study)))
    for line in (*closing(rows), f"The study's findings: {verdicts_text(findings(studies, points))}."):
        console.print(line, markup=False, highlight=False)
    typer.echo(f"page: {page}")


def _table(rows: Sequence[WinnerRow]) -> Table:
    """Return a row per criterion: who is best, and at how many settings."""
    table = Table.grid(padding=(0, 0, 0, 2), expand=True)
    for ratio in (3, 8):
        table.add_column(ratio=ratio, overflow="fold")
    criteria = dict.fromkeys(row.criterion.name for row in rows)
    for name in criteria:
        mine = [row for row in rows if row.criterion.name == name]
        counts = Counter(row.verdict_text for row in mine)
        told = [f"{text}, {count} of {len(mine)}" if len(mine) > 1 else text for text, count in counts.most_common()]
        table.add_row(escape(name), escape("; ".join(told)))
    return table
