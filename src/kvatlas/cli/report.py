"""``kvatlas report``: a records file as a page, and its winners in the terminal. Measures nothing, loads no torch."""

from __future__ import annotations

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
    from kvatlas.reports.answer import answer
    from kvatlas.reports.page import write_report
    from kvatlas.reports.winners import winners_table

    page = write_report(records, out)
    with RecordStore(records, mode="read") as store:
        rows = winners_table(store)
    console = Console()
    for (experiment, model), study in groupby(rows, key=lambda row: (row.experiment, row.model)):
        console.rule(f"[bold]{escape(experiment)}[/] on {escape(model)}", align="left")
        for criterion, group in groupby(study, key=lambda row: row.criterion.name):
            console.print(_table(criterion, list(group)))
    console.print(answer(rows), markup=False, highlight=False)
    typer.echo(f"page: {page}")


def _table(criterion: str, rows: Sequence[WinnerRow]) -> Table:
    table = Table.grid(padding=(0, 0, 0, 2), expand=True)
    table.title, table.title_justify, table.title_style = escape(criterion), "left", "bold"
    for ratio in (3, 4, 4):
        table.add_column(ratio=ratio, overflow="fold")
    for row in rows:
        value = f"{row.value_text} ({row.interval_text})"
        table.add_row(*(escape(cell) for cell in (row.condition, row.verdict_text, value)))
    return table
