"""Options that several commands share, and the texts around them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_RECORDS = Path("out/records.duckdb")
DEFAULT_REPORT = Path("out/report")

Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A folder, a GGUF file, a hub id, smollm2-135m, or random:llama-100m. Default: the bundled model.",
    ),
]
KvMemory = Annotated[str, typer.Option(metavar="SIZE", help="Byte budget of the cache, such as 512MiB or 2GB.")]
HostMemory = Annotated[
    str, typer.Option(metavar="SIZE", help="Byte budget of the host tier, for offloading and swapping; 0 for none.")
]
Link = Annotated[
    str | None,
    typer.Option(metavar="RATE", help="Rate of an emulated link between the tiers, such as 16GB/s,10us."),
]
DType = Annotated[str, typer.Option(metavar="NAME", help="Of weights: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:<index>.")]
LinearWeights = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Copies of weights for steps of few tokens on the CPU: auto (16 bits where exact), off, "
        "fp32 (no copy), or fp16, bf16, int8, which round.",
    ),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file with strategies of your own; may be repeated."),
]
Records = Annotated[Path, typer.Option(metavar="FILE", help="The records file (DuckDB).")]


def examples(*lines: str) -> str:
    """Return an epilog that shows command lines, one per line."""
    shown = (f"[bold]$[/] {line.replace('[', chr(92) + '[')}" for line in lines)
    return "\n\n".join(["Examples:", *shown])


def whole_numbers(text: str) -> Any:
    """Return ``"512,1024"`` as whole numbers.

    Raises:
        typer.BadParameter: a part is something else.
    """
    return _numbers(text, int, "whole numbers separated by commas, such as 512,1024")


def fractions(text: str) -> Any:
    """Return ``"0.5,0.2"`` as floats.

    Raises:
        typer.BadParameter: a part is something else.
    """
    return _numbers(text, float, "numbers separated by commas, such as 0.5,0.2")


def _numbers(text: str, kind: type[int] | type[float], wanted: str) -> tuple[int | float, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not understood; write {wanted}.") from error
