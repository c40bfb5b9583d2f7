"""Tables for people, one JSON line for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kvatlas.bench.cases import AGREE_TOKENS, Answer, Case
from kvatlas.bench.decode import Cell
from kvatlas.bench.peers import OURS

_WIDTH = 140
RATES = ("decode_per_s", "decode_per_cpu_s", "prefill_per_s", "prefill_per_cpu_s")


def decode_table(cell: Cell) -> Table:
    """Return the rows of one cell."""
    lanes, limits = cell.lanes, cell.limits
    title = (
        f"decode attention, batch {lanes.batch}, {lanes.context} tokens, {cell.threads} thread(s); {lanes.query_heads} "
        f"query and {lanes.kv_heads} KV heads of {lanes.head_dim}. Machine, same rounds: reads "
        f"{limits.read_bytes_per_s / 1e9:.1f} GB/s ({limits.read_by}), {limits.flop_per_s / 1e9:.0f} GFLOP/s"
    )
    best = cell.best_torch
    table = _table(
        title, "form", "wall ms", "CPU ms", f"x over {best.form if best else 'torch'}", "by CPU", "GB/s", "of read",
        "of FLOP/s", "error",
    )  # fmt: skip
    for row in cell.told():
        table.add_row(
            row["form"],
            f"{row['wall_ms']:.3f}",
            f"{row['cpu_ms']:.3f}",
            "-" if best is None else f"{row['over_best_torch']:.2f}",
            "-" if best is None else f"{row['over_best_torch_cpu']:.2f}",
            f"{row['read_bytes_per_s'] / 1e9:.2f}",
            f"{row['share_of_read']:.0%}",
            f"{row['share_of_flop']:.0%}",
            f"{row['error']:.1e}",
        )
    table.caption = "\n".join(f"skipped: {form}: {reason}" for form, reason in cell.skipped.items()) or None
    return table


def blocks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_blocks`."""
    first = rows[0]
    table = _table(
        f"{first['blocks']} blocks of 32 tokens x 128, keys and values, {first['threads']} thread(s)",
        "operation", "format", "wall ms", "CPU ms", "10^9 elements/s", texts=2,
    )  # fmt: skip
    for row in rows:
        speed = f"{row['elements_per_s'] / 1e9:.2f}"
        table.add_row(row["operation"], row["format"], f"{row['wall_ms']:.3f}", f"{row['cpu_ms']:.3f}", speed)
    return table


def linear_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_linear`."""
    first = rows[0]
    table = _table(
        f"linear of {first['inputs']} to {first['outputs']}, {first['threads']} thread(s)",
        "rows", "weights", "wall ms", "CPU ms", "x over F.linear", "by CPU", "GB/s of weights", texts=2,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row["rows"]),
            row["weights"],
            f"{row['wall_ms']:.3f}",
            f"{row['cpu_ms']:.3f}",
            f"{row['over_torch']:.2f}",
            f"{row['over_torch_cpu']:.2f}",
            f"{row['weight_bytes_per_s'] / 1e9:.1f}",
        )
    return table


def columns_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_columns`."""
    table = _table(
        f"column sums of a chunk, {rows[0]['threads']} thread(s), float32",
        "heads", "tokens", "past", "form", "wall ms", "CPU ms", "x over torch", "by CPU", "GFLOP/s", texts=4,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row['query_heads']}/{row['kv_heads']} of {row['head_dim']}",
            str(row["tokens"]),
            str(row["past"]),
            row["form"],
            f"{row['wall_ms']:.2f}",
            f"{row['cpu_ms']:.2f}",
            f"{row['over_torch']:.2f}",
            f"{row['over_torch_cpu']:.2f}",
            f"{row['flop_per_s'] / 1e9:.1f}",
        )
    return table


def layers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_layers`."""
    table = _table(
        f"{rows[0]['model']} without its attention, {rows[0]['threads']} thread(s), float32",
        "rows", "layers", "wall ms", "CPU ms", "x over transformers", "by CPU", texts=2,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row["rows"]),
            row["form"],
            f"{row['wall_ms']:.2f}",
            f"{row['cpu_ms']:.2f}",
            f"{row['over_torch']:.2f}",
            f"{row['over_torch_cpu']:.2f}",
        )
    return table


def engine_table(model: str, threads: int, found: Sequence[tuple[Case, Sequence[Answer]]]) -> Table:
    """Return all engines case by case; the first engine of each case is ours."""
    table = _table(
        f"{model}, {threads} thread(s), float32; a case is batch x prompt + decode steps; x: ours over it",
        "case", "engine", "decode tok/s", "x", "per CPU-s", "x", "prefill tok/s", "x", "per CPU-s", "x",
        f"same first {AGREE_TOKENS}", "repeats", texts=2,
    )  # fmt: skip
    for case, answers in found:
        for number, answer in enumerate(answers):
            over = _ours_over(answers, answer)
            rates = [cell for name in RATES for cell in (_told(getattr(answer, name), 4), _told(over[name], 3))]
            same = f"{answer.agree[0]}/{answer.agree[1]}"
            first = "" if number else str(case)
            table.add_row(first, answer.engine, *rates, same, str(answer.repeats), end_section=answer is answers[-1])
    return table


def told_answers(found: Sequence[tuple[Case, Sequence[Answer]]]) -> list[dict[str, Any]]:
    """Return the answers as plain JSON values, with what ours is over each of them."""
    told = []
    for case, answers in found:
        for answer in answers:
            ratios = {f"ours_over_{name}": ratio for name, ratio in _ours_over(answers, answer).items()}
            told.append({"case": str(case)} | dataclasses.asdict(answer) | ratios)
    return told


def _ours_over(answers: Sequence[Answer], answer: Answer) -> dict[str, float | None]:
    """Return the rates of ours, the first engine, over those of one engine; None where either is missing."""
    if not answers[0].engine.startswith(OURS):
        return dict.fromkeys(RATES)
    pairs = {name: (getattr(answers[0], name), getattr(answer, name)) for name in RATES}
    return {name: None if None in pair else pair[0] / pair[1] for name, pair in pairs.items()}


def _told(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def overhead_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_overhead`."""
    parts = list(found[0]["parts_ms"])
    table = _table(
        f"decode steps under {found[0]['strategy']} after {found[0]['prompt_tokens']} tokens, median ms of each part",
        "model", "batch", "step ms", *parts, "overhead",
    )  # fmt: skip
    for row in found:
        times = [f"{row['parts_ms'][part]:.3f}" for part in parts]
        share = f"{row['overhead_share']:.1%}"
        table.add_row(row["model"], str(row["batch"]), f"{row['step_ms']:.2f}", *times, share)
    return table


def wide_console() -> Console:
    """Return a console on the standard output, wide enough for the tables where nobody looks at a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def print_json(console: Console, **values: Any) -> None:
    """Print one line of JSON, whatever the width of the console."""
    console.file.write(json.dumps(values, allow_nan=False) + "\n")
    console.file.flush()


def _table(title: str, *columns: str, texts: int = 1) -> Table:
    """Return an empty table; the first ``texts`` columns hold words, the rest numbers."""
    table = Table(title=title, title_justify="left", title_style="", caption_justify="left", caption_style="")
    for number, column in enumerate(columns):
        words = number < texts
        table.add_column(column, justify="left" if words else "right", no_wrap=words)
    return table
