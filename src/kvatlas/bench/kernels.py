"""All kernel benchmarks at one number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from kvatlas.bench.blocks import measure_blocks
from kvatlas.bench.columns import CHUNKS, QUICK, measure_columns
from kvatlas.bench.decode import measure_cell
from kvatlas.bench.layers import measure_layers
from kvatlas.bench.linear import measure_linear
from kvatlas.bench.machine import READ_BYTES, torch_threads
from kvatlas.bench.paged import COLD_BYTES, Lanes
from kvatlas.bench.tables import blocks_table, columns_table, decode_table, layers_table, linear_table
from kvatlas.core.vocabulary import Format

_BLOCKS = 512
_ROWS = (1, 2, 4, 8, 16, 32)
_LINEARS = ((2048, 8192),)
_LAYERS = "random:llama-55m"
_LAYER_ROWS = (1, 4, 16, 512)


def measure_kernels(
    ops: Sequence[str],
    formats: Sequence[Format],
    contexts: Sequence[int],
    batches: Sequence[int],
    *,
    threads: int,
    repeats: int,
    quick: bool,
    show: Callable[[Table], None],
    read_bytes: int = READ_BYTES,
    cold_bytes: int = COLD_BYTES,
) -> dict[str, Any]:
    """Return the rows of each operation as plain JSON values; ``show`` gets each table as soon as it is measured."""
    told: dict[str, Any] = {}
    with torch_threads(threads):
        if "decode" in ops:
            told["decode"], told["limits"], told["skipped"] = [], [], []
            for context in contexts:
                for batch in batches:
                    lanes = Lanes(batch=batch, context=context, cold_bytes=cold_bytes)
                    cell = measure_cell(lanes, threads, formats, repeats, read_bytes=read_bytes)
                    show(decode_table(cell))
                    where = {"batch": batch, "context": context}
                    told["decode"] += cell.told()
                    told["limits"].append(where | cell.limits.told())
                    told["skipped"] += [where | {"form": form, "why": why} for form, why in cell.skipped.items()]
        if "blocks" in ops:
            told["blocks"] = measure_blocks(formats, _BLOCKS // (8 if quick else 1), threads, repeats)
            show(blocks_table(told["blocks"]))
        if "columns" in ops:
            told["columns"] = measure_columns(QUICK if quick else CHUNKS, threads, repeats)
            show(columns_table(told["columns"]))
        if "linear" in ops:
            told["linear"] = []
            for inputs, outputs in _LINEARS:
                rows = measure_linear(
                    _ROWS[:3] if quick else _ROWS, inputs, outputs, threads, repeats, cold_bytes=cold_bytes
                )
                told["linear"] += rows
                show(linear_table(rows))
        if "layers" in ops:
            told["layers"] = measure_layers(_LAYERS, _LAYER_ROWS[:2] if quick else _LAYER_ROWS, threads, repeats)
            show(layers_table(told["layers"]))
    return told
