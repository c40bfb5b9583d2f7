"""Request traces: read one from a file of any known format, and scale it to the machine at hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.workloads.azure import COLUMNS, read_azure
from kvatlas.workloads.conversations import Encode, conversation_trace
from kvatlas.workloads.lines import read_lines
from kvatlas.workloads.lmsys import TURNS as LMSYS_TURNS, read_lmsys
from kvatlas.workloads.mooncake import HASH_BLOCK_TOKENS, read_mooncake
from kvatlas.workloads.request import Trace, TraceRequest
from kvatlas.workloads.rows import is_parquet, parquet_columns, read_start
from kvatlas.workloads.sharegpt import TURNS as SHAREGPT_TURNS, read_sharegpt

__all__ = ["Trace", "TraceRequest", "read_trace", "scale_trace"]


# Names of formats with conversations, and the field that tells them apart.
_CONVERSATIONS = {"sharegpt": SHAREGPT_TURNS, "lmsys": LMSYS_TURNS}


def read_trace(
    path: str | Path,
    *,
    hash_block_tokens: int = HASH_BLOCK_TOKENS,
    encode: Encode | None = None,
    limit: int | None = None,
) -> Trace:
    """Return the trace in a file, whose format is told from its content.

    Known are Azure's CSV (TIMESTAMP,ContextTokens,GeneratedTokens), Mooncake's JSONL (timestamp, input_length,
    output_length, hash_ids), and files of conversations: ShareGPT (``conversations``) and LMSYS-Chat-1M
    (``conversation``), as JSON or parquet. Of a conversation the first question and the length of its answer are
    taken; see `kvatlas.workloads.conversations.conversation_trace` for what such a trace makes up.

    Args:
        path: the file. The trace is named after it; its licence is "not stated".
        hash_block_tokens: tokens that one hash id covers, where the format has them.
        encode: text to token ids, without special tokens, for the lengths of conversations; None estimates them.
        limit: most requests of conversations, which are read no further then; None for all.

    Raises:
        TraceError: the file cannot be read, has no known format, or has a malformed line.
    """
    path = Path(path)
    kind = _conversation_format(path)
    if kind is not None:
        conversations = read_sharegpt(path) if kind == "sharegpt" else read_lmsys(path)
        return conversation_trace(path, conversations, encode, limit=limit)
    place, first = read_lines(path)[0]
    if first.startswith("{"):
        return read_mooncake(path, hash_block_tokens)
    if COLUMNS[0] in first:
        return read_azure(path)
    raise place.error(first, f"the header {','.join(COLUMNS)} (Azure) or a JSON object (Mooncake, conversations)")


def _conversation_format(path: Path) -> str | None:
    """Return "sharegpt" or "lmsys" for a file of conversations, by its columns or its first characters."""
    if not path.is_file():
        return None
    if is_parquet(path):
        columns = parquet_columns(path)
        found = next((kind for kind, field in _CONVERSATIONS.items() if field in columns), None)
        if found is None:
            fields = " or ".join(map(repr, _CONVERSATIONS.values()))
            raise TraceError(f"{path} has no column {fields}, so it holds no requests; it has {', '.join(columns)}")
        return found
    start = read_start(path).decode("utf-8-sig", errors="replace").lstrip()
    if start[:1] not in ("{", "["):
        return None
    named = (kind for kind, field in _CONVERSATIONS.items() if re.search(rf'"{field}"\s*:', start))
    return next(named, "sharegpt" if start[:1] == "[" else None)


def scale_trace(
    trace: Trace,
    *,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
    start: int = 0,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> Trace:
    """Return a smaller, shorter, faster or slower trace; each change leaves a note.

    Requests are selected first; then lengths are scaled, then cut. Arrivals move to start at 0 and are scaled.

    A length is rounded to the nearest integer (ties to even), and is at least 1. A prompt with hashes is
    scaled block by block, so that shared prefixes stay shared: the hash block is rounded, full blocks become
    full blocks, and the rest of the prompt is scaled by the ratio of the rounded block to the old one. So
    blocks of 512 tokens at 0.01 become blocks of 5 (not 5.12), and their prompts shrink to 5 / 512.

    Args:
        trace: the trace; stays as it is.
        time_scale: factor on arrival times, >= 0: 0.5 doubles the request rate, 0 lets all arrive at once.
        length_scale: factor on prompt and output lengths, > 0.
        start: requests to skip.
        limit: requests to take, or None for all that follow.
        max_prompt_tokens: longer prompts are cut at their end, after scaling.
        max_output_tokens: longer outputs are cut, after scaling.

    Raises:
        ConfigError: a factor or number is out of range, or no request is left.
    """
    _check_scales(time_scale, length_scale)
    _check_counts(start=start, limit=limit, max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_output_tokens)
    chosen = trace.requests[start : None if limit is None else start + limit]
    if not chosen:
        raise ConfigError(f"start={start} leaves none of the {len(trace.requests)} requests of {trace.name!r}")
    requests = [_scale_lengths(request, length_scale) for request in chosen]
    requests = [_cut(request, max_prompt_tokens, max_output_tokens) for request in requests]
    first_s = requests[0].arrival_s
    moved = tuple(replace(request, arrival_s=(request.arrival_s - first_s) * time_scale) for request in requests)
    changes = {
        f"requests {start} to {start + len(chosen) - 1}": len(chosen) < len(trace.requests),
        f"lengths times {length_scale:g}": length_scale != 1,
        f"prompts of at most {max_prompt_tokens} tokens": max_prompt_tokens is not None,
        f"outputs of at most {max_output_tokens} tokens": max_output_tokens is not None,
        f"arrival times times {time_scale:g}": time_scale != 1,
    }
    return replace(trace, requests=moved, notes=trace.notes + tuple(note for note, made in changes.items() if made))


def _check_scales(time_scale: float, length_scale: float) -> None:
    if not (math.isfinite(time_scale) and time_scale >= 0):
        raise ConfigError(f"time_scale is {time_scale}; want a finite factor >= 0")
    if not (math.isfinite(length_scale) and length_scale > 0):
        raise ConfigError(f"length_scale is {length_scale}; want a finite factor > 0")


def _check_counts(*, start: int, **limits: int | None) -> None:
    if start < 0:
        raise ConfigError(f"start is {start}; want a number of requests >= 0")
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; want at least 1, or None")


def _scaled(length: int, factor: float) -> int:
    return max(1, round(length * factor))


def _scale_lengths(request: TraceRequest, factor: float) -> TraceRequest:
    output_tokens = _scaled(request.output_tokens, factor)
    old = request.hash_block_tokens
    if not request.prefix_hashes or old is None:
        return replace(request, prompt_tokens=_scaled(request.prompt_tokens, factor), output_tokens=output_tokens)
    new = _scaled(old, factor)
    full, rest = divmod(request.prompt_tokens, old)
    prompt_tokens = full * new + (_scaled(rest, new / old) if rest else 0)
    return replace(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens, hash_block_tokens=new)


def _cut(request: TraceRequest, max_prompt_tokens: int | None, max_output_tokens: int | None) -> TraceRequest:
    """Cut lengths and the hashes of blocks that are gone; the last may stand for a part of its block."""
    prompt_tokens = min(request.prompt_tokens, max_prompt_tokens or request.prompt_tokens)
    output_tokens = min(request.output_tokens, max_output_tokens or request.output_tokens)
    blocks = math.ceil(prompt_tokens / (request.hash_block_tokens or 1))
    hashes = request.prefix_hashes[:blocks]
    return replace(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefix_hashes=hashes)
