"""What driving a server showed, as ``kvatlas drive`` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvatlas.metrics.latency import (
    RequestTimes,
    Slo,
    goodput,
    output_throughput,
    percentile,
    request_throughput,
    total_throughput,
)

if TYPE_CHECKING:
    from kvatlas.experiments.peer import Served

_LATE_S = 0.05
_OFF = 0.05


def tell_served(served: Served, slo: Slo, asked: int) -> None:
    """Print rates, a table of latencies, and what a reader must know before believing them."""
    console = Console()
    console.rule("[bold]Serving Benchmark Result", characters="=")
    console.print(_totals(served, slo, asked))
    if served.answers:
        console.print(_latencies(served.times))
    for note in _notes(served):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _totals(served: Served, slo: Slo, asked: int) -> Table:
    times, wall_s = served.times, served.wall_s
    rows = {
        "Successful requests": f"{len(times)} of {asked}",
        "Failed requests": f"{len(served.failures)}",
        "Benchmark duration (s)": f"{wall_s:.2f}",
        "Total prompt tokens": f"{sum(one.prompt_tokens for one in times)}",
        "Total output tokens": f"{sum(one.output_tokens for one in times)}",
        "Request throughput (req/s)": f"{request_throughput(times, wall_s):.2f}",
        "Output token throughput (tok/s)": f"{output_throughput(times, wall_s):.2f}",
        "Total token throughput (tok/s)": f"{total_throughput(times, wall_s):.2f}",
        f"Request goodput (req/s), {slo}": f"{goodput(times, slo, wall_s):.2f}",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _latencies(times: Sequence[RequestTimes]) -> Table:
    pooled = {
        "TTFT (ms)": [one.ttft_s for one in times],
        "TPOT (ms)": [one.tpot_s for one in times if one.tpot_s is not None],
        "ITL (ms)": [gap for one in times for gap in one.itl_s],
        "E2E (ms)": [one.e2e_s for one in times],
    }
    table = Table(box=None)
    for index, heading in enumerate(("", "mean", "median", "p90", "p99")):
        table.add_column(heading, justify="right" if index else "left")
    for name, values in pooled.items():
        if values:
            found = [sum(values) / len(values), *(percentile(values, rank) for rank in (50, 90, 99))]
            table.add_row(name, *(f"{value * 1e3:.2f}" for value in found))
    return table


def _notes(served: Served) -> list[str]:
    """Return what sets this run apart from one without blemish."""
    from kvatlas.experiments.endpoint import EXTENSIONS

    asked = sum(answer.asked_prompt_tokens for answer in served.answers)
    counted = sum(answer.times.prompt_tokens for answer in served.answers)
    dropped = [name for name in EXTENSIONS if name not in served.dialect.extensions]
    found = {
        f"{len(served.failures)} requests failed, the first with: {next(iter(served.failures), '')}": served.failures,
        f"the server refuses {', '.join(dropped)}; the run went on without": dropped,
        "the server refuses token ids; prompts went as text of about as many tokens": served.dialect.text,
        f"the server counted {counted} prompt tokens, {asked} were meant": abs(counted - asked) > _OFF * asked,
        "the server does not count tokens; each chunk of text was taken for one": not all(
            answer.counted for answer in served.answers
        ),
        f"{served.short} answers are shorter than asked for; the server ends them": served.short,
        f"a request was sent {served.late_s * 1e3:.0f} ms later than planned: this machine is busy": served.late_s
        > _LATE_S,
    }
    return [note for note, holds in found.items() if holds]
