"""LMSYS-Chat-1M: a million conversations with 25 models (arXiv:2309.11998), as parquet or JSON lines.

A row holds ``conversation_id``, ``model``, ``conversation`` (turns ``{"role": "user" or "assistant", "content":
"..."}``), ``turn``, ``language``, ``openai_moderation`` and ``redacted``; the name, the model, the turns and the
language are read. The data set asks its users to accept a licence, so no part of it is shipped here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvatlas.workloads.conversations import Conversation, turn_of
from kvatlas.workloads.lines import Place
from kvatlas.workloads.rows import is_parquet, parquet_columns, read_json_rows, read_parquet_rows

ID, TURNS = "conversation_id", "conversation"


def read_lmsys(path: str | Path, *, language: str | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a file, one after the other.

    Args:
        path: one parquet file of the data set, or its rows as JSON lines.
        language: only conversations in this language, as the data set calls it, such as "English"; None for all.

    Raises:
        TraceError: the file or a row of it cannot be read.
    """
    path = Path(path)
    if is_parquet(path):
        there = parquet_columns(path)
        rows = read_parquet_rows(path, [ID, TURNS, *(name for name in ("model", "language") if name in there)])
    else:
        rows = read_json_rows(path)
    for place, row in rows:
        if language is None or row.get("language") == language:
            yield _conversation(place, row)


def _conversation(place: Place, row: dict[str, Any]) -> Conversation:
    for name in (ID, TURNS):
        if name not in row:
            raise place.error(sorted(row), f"the field {name!r}")
    turns, name = row[TURNS], row[ID]
    if not isinstance(name, str) or not name:
        raise place.error(name, f"{ID} as a text")
    if not isinstance(turns, list):
        raise place.error(turns, f'{TURNS} as a list of turns like {{"role": "user", "content": "Hello"}}')
    model, language = row.get("model"), row.get("language")
    return Conversation(
        id=name,
        turns=tuple(turn_of(place, turn, "role", "content") for turn in turns),
        model=model if isinstance(model, str) and model else None,
        language=language if isinstance(language, str) and language else None,
    )
