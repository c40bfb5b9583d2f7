"""What all trace readers share: opening the file, naming a bad value, sorting the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kvatlas.core.errors import TraceError
from kvatlas.workloads.request import Trace, TraceRequest


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line of a file, for messages; or an entry or row, where lines say nothing. All count from 1."""

    path: Path
    line: int
    unit: str = "line"

    def error(self, value: object, expected: str) -> TraceError:
        """Return an error that names file, line, value and what was expected."""
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        where = f"{self.path}, {self.unit} {self.line}"
        return TraceError(f"{where}: got {shown}, expected {expected}; mend or remove the {self.unit}")


@dataclass(frozen=True, kw_only=True)
class RawRequest:
    """A request as the file has it: the arrival is an exact integer count of ticks."""

    ticks: int
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    session: str | None = None


def read_lines(path: Path) -> list[tuple[Place, str]]:
    """Return the lines that are not blank, each with its place.

    Raises:
        TraceError: the file is missing, a folder, unreadable, not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TraceError(f"trace {path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"trace {path} is not UTF-8 text; unpack it first if it is compressed") from error
    numbered = enumerate(text.split("\n"), start=1)
    lines = [(Place(path=path, line=number), line.strip()) for number, line in numbered if line.strip()]
    if not lines:
        raise TraceError(f"trace {path} is empty; want a CSV or JSONL file with one request per line")
    return lines


def make_trace(
    path: Path, rows: Sequence[RawRequest], *, ticks_per_s: int, hash_block_tokens: int | None = None
) -> Trace:
    """Return the trace sorted by arrival, from time 0; a note tells if the file was not sorted."""
    if not rows:
        raise TraceError(f"trace {path} has a header but no requests; want one per line")
    order = sorted(range(len(rows)), key=lambda number: rows[number].ticks)
    start = rows[order[0]].ticks
    requests = tuple(
        TraceRequest(
            number=number,
            arrival_s=(rows[number].ticks - start) / ticks_per_s,
            prompt_tokens=rows[number].prompt_tokens,
            output_tokens=rows[number].output_tokens,
            prefix_hashes=rows[number].prefix_hashes,
            hash_block_tokens=hash_block_tokens if rows[number].prefix_hashes else None,
            session=rows[number].session,
        )
        for number in order
    )
    late = sum(earlier > later for earlier, later in pairwise(order))
    notes = (f"the file was not sorted by arrival ({late} places); it was sorted",) if late else ()
    return Trace(name=path.stem, source=str(path), licence="not stated", requests=requests, notes=notes)
