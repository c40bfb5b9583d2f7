"""Traces and conversations: Azure's CSV, Mooncake's JSONL, ShareGPT and LMSYS as JSON, JSON lines and parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import duckdb
from tests.fuzz.harness import Case, Target
from tests.fuzz.values import mutated
from tests.fuzz.workplace import Workplace, must

from kvatlas.workloads.materialize import prompt_ids
from kvatlas.workloads.request import Trace
from kvatlas.workloads.trace import read_trace, scale_trace

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, 9, 10**9, 10**18, 10**30, 1e300, -0.0, float("nan"), float("inf")),
    *("", "a", "3", "nan", "\x00", "\ud800", "é" * 50, "a" * 5000, [], [0], [[]], [None], {}, {"a": 1}, [1.0], ["a"]),
)
_CELLS = (
    *("", "0", "1", "-1", "1.5", "1e3", "9" * 9, "9" * 10, "9" * 5000, "nan", " 7 ", "٣", '"7"', '"', "a,b", "\x00"),
    *("2023-02-30 00:00:00", "0000-01-01 00:00:00", "9999-12-31 23:59:60", "2023-11-16T18:15:46Z", "\ufeff5"),
    *("2023-11-16 18:15:46.123456789", "2023-11-16 18:15:46+25:00", "0001-01-01 00:00:00+23:59", "1700000000"),
)
_SCALES = (1.0, 0.5, 2.0, 0.0, -1.0, 1e-9, 1e9, 1e300, 5e-324, float("inf"), float("nan"), 1e-300)
_COUNTS = (None, 1, 2, 3, 100, 0, -1, 10**30)


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: a file is written, read, scaled, and its prompts are made."""
    form = rng.choice(sorted(_FORMS))
    path = place.folder / f"trace.{rng.choice((form, 'txt', 'csv', 'jsonl', ''))}".rstrip(".")
    data = _FORMS[form](rng, path)
    options: dict[str, Any] = {"limit": rng.choice(_COUNTS) if rng.random() < 0.15 else None}
    if rng.random() < 0.1:
        options["hash_block_tokens"] = rng.choice((512, 1, 16, 0, -1, 10**12))
    if rng.random() < 0.3:
        options["encode"] = lambda text: place.tokenizer(text)["input_ids"]
    scales = {
        "time_scale": rng.choice(_SCALES) if rng.random() < 0.2 else 1.0,
        "length_scale": rng.choice(_SCALES) if rng.random() < 0.2 else 0.5,
        **{name: rng.choice(_COUNTS) for name in ("limit", "max_prompt_tokens") if rng.random() < 0.1},
    }

    def run() -> None:
        path.write_bytes(data)
        try:
            _use(scale_trace(read_trace(path, **options), **scales))
        finally:
            path.unlink()

    return Case(told=f"scale_trace(read_trace({path.name!r}, **{options}), **{scales}) of {data[:3000]!r}", run=run)


def _use(trace: Trace) -> None:
    times = [request.arrival_s for request in trace.requests]
    must(all(0 <= time < float("inf") for time in times) and times == sorted(times), f"arrivals {times[:5]}")
    for request in trace.requests[:3]:
        must(request.prompt_tokens >= 1 and request.output_tokens >= 1, f"{request}")
        if request.prompt_tokens < 100_000:
            must(len(prompt_ids(request, 1000, 0)) == request.prompt_tokens, f"{request}")


def _azure(rng: Random, _: Path) -> bytes:
    rows = [["TIMESTAMP", "ContextTokens", "GeneratedTokens"]]
    rows += [
        [f"2023-11-16 18:15:{second:02}.6805900", str(50 + second), "7"] for second in range(rng.choice((0, 1, 5)))
    ]
    for _ in range(rng.choice((0, 0, 1, 2))):
        row = rng.choice(rows[1:] or rows) if rng.random() < 0.8 else rows[0]
        row[rng.randrange(3)] = rng.choice(_CELLS)
    if rng.random() < 0.1:
        rng.choice(rows).append(rng.choice(_CELLS))
    end = rng.choice(("\n", "\n", "\r\n", "\r"))
    return _spoilt(rng, end.join(",".join(row) for row in rows))


def _mooncake(rng: Random, _: Path) -> bytes:
    rows: list[Any] = [
        {"timestamp": 3000 * number, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]}
        for number in range(rng.choice((1, 3)))
    ]
    return _spoilt(rng, "\n".join(json.dumps(row) for row in _with_odd(rng, rows)))


def _sharegpt(rng: Random, _: Path) -> bytes:
    return _conversations(rng, "conversations", {"id": "a"}, ("from", "value"), ("human", "gpt"))


def _lmsys(rng: Random, _: Path) -> bytes:
    extra = {"conversation_id": "a", "model": "m", "language": "English"}
    return _conversations(rng, "conversation", extra, ("role", "content"), ("user", "assistant"))


def _conversations(
    rng: Random, field: str, extra: dict[str, Any], names: tuple[str, str], roles: tuple[str, str]
) -> bytes:
    said = ("How is the weather today in the mountains?", "Cold and clear, with some wind from the north.")
    turns = [dict(zip(names, pair, strict=True)) for pair in zip(roles, said, strict=True)]
    rows = [extra | {field: [dict(turn) for turn in turns]} for _ in range(rng.choice((1, 3)))]
    rows = _with_odd(rng, rows, inner=field)
    text = json.dumps(rows) if rng.random() < 0.5 else "\n".join(json.dumps(row) for row in rows)
    return _spoilt(rng, text)


def _parquet(rng: Random, path: Path) -> bytes:
    turn = "{'from': 'human', 'value': 'How is the weather today?'}, {'from': 'gpt', 'value': 'Cold and clear today.'}"
    columns = rng.choice(
        (
            f"'a' AS id, [{turn}] AS conversations",
            "'a' AS id, [] AS conversations",
            "'a' AS id, NULL AS conversations",
            "1 AS id, 'text' AS conversations",
            "'a' AS id, [{'from': 'human', 'value': 3}] AS conversations",
            "'a' AS conversation_id, [{'role': 'user', 'content': 'How is it today in the hills?'}] AS conversation",
            "NULL AS conversation_id, 'm' AS model, 3 AS conversation",
            "3 AS number",
            "'\\x00'::BLOB AS conversations",
        )
    )
    whole = path.with_suffix(".made")
    duckdb.sql(f"COPY (SELECT {columns} FROM range({rng.choice((0, 1, 3))})) TO '{whole}' (FORMAT parquet)")
    data = whole.read_bytes()
    whole.unlink()
    return mutated(rng, data) if rng.random() < 0.4 else data


def _with_odd(rng: Random, rows: list[Any], inner: str | None = None) -> list[Any]:
    """Return the rows with an odd value somewhere, in some cases."""
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        row = rng.choice(rows)
        if not isinstance(row, dict) or rng.random() < 0.08:
            rows[rng.randrange(len(rows))] = rng.choice(_ODD)
            continue
        if inner is not None and isinstance(row.get(inner), list) and row[inner] and rng.random() < 0.5:
            turns = row[inner]
            turns[rng.randrange(len(turns))] = rng.choice(
                (*_ODD, *({name: rng.choice(_ODD)} for name in ("value", "from")))
            )
            continue
        key = rng.choice([*row, "session_id", "extra"])
        if key in row and rng.random() < 0.2:
            del row[key]
        else:
            row[key] = rng.choice(_ODD)
    return rows


def _spoilt(rng: Random, text: str) -> bytes:
    kind = rng.random()
    if kind < 0.15:
        return mutated(rng, text.encode("utf-8", "surrogatepass"))
    if kind < 0.22:
        return text.encode(rng.choice(("utf-8-sig", "utf-16", "latin-1")), "replace")
    return b"" if kind < 0.23 else text.encode("utf-8", "surrogatepass")


_FORMS: dict[str, Callable[[Random, Path], bytes]] = {
    "csv": _azure,
    "jsonl": _mooncake,
    "json": _sharegpt,
    "ndjson": _lmsys,
    "parquet": _parquet,
}
TARGET = Target(name="traces", make=make)
