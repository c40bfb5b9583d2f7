"""Mooncake traces: JSONL with timestamp (ms), input_length, output_length and hash_ids (FAST 2025).

A hash id names one block of the prompt *and all before it*; equal leading ids mean an equal prefix.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kvatlas.core.errors import TraceError
from kvatlas.workloads.lines import Place, RawRequest, make_trace, read_lines
from kvatlas.workloads.request import Trace

HASH_BLOCK_TOKENS = 512

_TICKS_PER_MS = 1000
_MAX_TOKENS = 999_999_999


def read_mooncake(path: Path, hash_block_tokens: int = HASH_BLOCK_TOKENS) -> Trace:
    """Return a Mooncake trace with its prefix hashes.

    Args:
        path: the JSONL file.
        hash_block_tokens: tokens that one hash id covers; 512 in Mooncake's own files.

    Raises:
        TraceError: the file or a line cannot be read, or the hashes do not fit the block size.
    """
    if hash_block_tokens < 1:
        raise TraceError(f"hash_block_tokens is {hash_block_tokens}; want at least 1 (Mooncake's own is 512)")
    rows = [_row(place, line, hash_block_tokens) for place, line in read_lines(path)]
    return make_trace(path, rows, ticks_per_s=1000 * _TICKS_PER_MS, hash_block_tokens=hash_block_tokens)


def _row(place: Place, line: str, hash_block_tokens: int) -> RawRequest:
    record = _record(place, line)
    time = _field(place, record, "timestamp")
    if not _is_number(time) or not 0 <= time < 1e15:
        raise place.error(time, "timestamp in milliseconds, >= 0")
    prompt_tokens = _count(place, record, "input_length")
    return RawRequest(
        ticks=round(time * _TICKS_PER_MS),
        prompt_tokens=prompt_tokens,
        output_tokens=_count(place, record, "output_length"),
        prefix_hashes=_hashes(place, record, prompt_tokens, hash_block_tokens),
        session=_session(place, record),
    )


def _record(place: Place, line: str) -> dict[str, Any]:
    expected = 'a JSON object like {"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [0]}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise place.error(line, expected) from error
    if not isinstance(record, dict):
        raise place.error(line, expected)
    return record


def _field(place: Place, record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise place.error(sorted(record), f"the field {name!r}")
    return record[name]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(place: Place, record: dict[str, Any], name: str) -> int:
    value = _field(place, record, name)
    if not _is_whole(value) or not 1 <= value <= _MAX_TOKENS:
        raise place.error(value, f"{name} as a whole number from 1 to {_MAX_TOKENS}")
    return int(value)


def _hashes(place: Place, record: dict[str, Any], prompt_tokens: int, block: int) -> tuple[int, ...]:
    """Return the hash ids: of every block of the prompt, or of its full blocks only; or none at all."""
    hashes = _field(place, record, "hash_ids")
    if not isinstance(hashes, list) or not all(_is_whole(value) for value in hashes):
        raise place.error(hashes, "hash_ids as a list of whole numbers")
    allowed = (math.ceil(prompt_tokens / block), prompt_tokens // block)
    if hashes and len(hashes) not in allowed:
        expected = f"{allowed[0]} for {prompt_tokens} tokens in blocks of {block}; is hash_block_tokens right?"
        raise place.error(f"{len(hashes)} hash_ids", expected)
    return tuple(hashes)


def _session(place: Place, record: dict[str, Any]) -> str | None:
    session = record.get("session_id")
    if session is not None and not isinstance(session, str) and not _is_whole(session):
        raise place.error(session, "session_id as a text or whole number")
    return None if session is None else str(session)
