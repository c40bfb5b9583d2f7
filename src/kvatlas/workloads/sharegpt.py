"""ShareGPT files: conversations that users of ChatGPT shared, as an array of JSON objects, as JSON lines or parquet.

An entry holds ``id`` and ``conversations``, a list of turns ``{"from": "human" or "gpt", "value": "..."}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvatlas.workloads.conversations import Conversation, turn_of
from kvatlas.workloads.lines import Place
from kvatlas.workloads.rows import is_parquet, parquet_columns, read_json_rows, read_parquet_rows

TURNS = "conversations"


def read_sharegpt(path: str | Path) -> Iterator[Conversation]:
    """Yield the conversations of a file, one after the other.

    Raises:
        TraceError: the file or an entry of it cannot be read.
    """
    path = Path(path)
    if is_parquet(path):
        there = parquet_columns(path)
        rows = read_parquet_rows(path, [TURNS, *(name for name in ("id", "model") if name in there)])
    else:
        rows = read_json_rows(path)
    for place, row in rows:
        yield _conversation(place, row)


def _conversation(place: Place, row: dict[str, Any]) -> Conversation:
    if TURNS not in row:
        raise place.error(sorted(row), f"the field {TURNS!r}")
    turns = row[TURNS]
    if not isinstance(turns, list):
        raise place.error(turns, f'{TURNS} as a list of turns like {{"from": "human", "value": "Hello"}}')
    name, model = row.get("id"), row.get("model")
    return Conversation(
        id=f"{place.unit} {place.line}" if name is None else str(name),
        turns=tuple(turn_of(place, turn, "from", "value") for turn in turns),
        model=model if isinstance(model, str) and model else None,
    )
