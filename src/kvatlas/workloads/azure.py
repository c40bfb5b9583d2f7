"""Azure LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Splitwise, ISCA 2024).

Timestamps have seven fractional digits, more than ``datetime`` keeps, so they are counted in ticks of 100 ns.
"""

from __future__ import annotations

import csv
import re
from datetime import UTC, datetime
from pathlib import Path

from kvatlas.workloads.lines import Place, RawRequest, make_trace, read_lines
from kvatlas.workloads.request import Trace

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_TICKS_PER_S = 10**7
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)
_COUNT = re.compile(r"\d{1,9}", re.ASCII)


def read_azure(path: Path) -> Trace:
    """Return an Azure trace; it has no prefix hashes, so its prompts are unrelated.

    Raises:
        TraceError: the file, its header or a line cannot be read.
    """
    (first, header), *lines = read_lines(path)
    columns = [name.strip() for name in _cells(header)]
    if not set(COLUMNS) <= set(columns):
        raise first.error(header, f"a header with the columns {', '.join(COLUMNS)}")
    places = [columns.index(name) for name in COLUMNS]
    rows = []
    for place, line in lines:
        cells = _cells(line)
        if len(cells) != len(columns):
            raise place.error(line, f"{len(columns)} values separated by commas")
        time, prompt, output = (cells[column].strip() for column in places)
        rows.append(
            RawRequest(
                ticks=_ticks(place, time),
                prompt_tokens=_count(place, "ContextTokens", prompt),
                output_tokens=_count(place, "GeneratedTokens", output),
            )
        )
    return make_trace(path, rows, ticks_per_s=_TICKS_PER_S)


def _cells(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def _ticks(place: Place, text: str) -> int:
    expected = "TIMESTAMP like 2023-11-16 18:15:46.6805900"
    match = _TIME.fullmatch(text)
    if match is None:
        raise place.error(text, expected)
    day, clock, fraction, zone = match.groups()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}{zone or '+00:00'}")
    except ValueError as error:
        raise place.error(text, expected) from error
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    seconds = since.days * 86_400 + since.seconds
    return seconds * _TICKS_PER_S + int((fraction or "0").ljust(7, "0")[:7])


def _count(place: Place, column: str, text: str) -> int:
    if not _COUNT.fullmatch(text) or int(text) < 1:
        raise place.error(text, f"{column} as a whole number from 1 to 999999999")
    return int(text)
