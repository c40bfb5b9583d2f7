"""Rows of large files, one after the other: JSON arrays, JSON lines, parquet. No file is held in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import duckdb

from kvatlas.core.errors import TraceError
from kvatlas.workloads.lines import Place

Row = tuple[Place, dict[str, Any]]

_PARQUET = b"PAR1"
_CHUNK_CHARACTERS = 2**20
_LONGEST_ENTRY = 2**28  # characters; a quotation mark that is never closed would swallow the file
_ROWS_AT_ONCE = 1024
_SPACE = re.compile(r"\s*")
_OBJECT = "a JSON object"


def read_start(path: Path, num_bytes: int = 2**16) -> bytes:
    """Return the first bytes of a file.

    Raises:
        TraceError: the file cannot be read.
    """
    with _opened(path, "rb") as file:
        start: bytes = file.read(num_bytes)
    return start


def is_parquet(path: Path) -> bool:
    """Whether the file begins as parquet files do.

    Raises:
        TraceError: the file cannot be read.
    """
    return read_start(path, len(_PARQUET)) == _PARQUET


def read_json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON array, or of a file with one object per line; blank lines are passed over.

    Raises:
        TraceError: the file cannot be read, or something in it is no JSON object.
    """
    is_array = read_start(path).decode("utf-8-sig", errors="replace").lstrip().startswith("[")
    with _opened(path, "r") as file:
        if is_array:
            yield from _Array(path, file).rows()
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = Place(path=path, line=number)
                yield place, _object(place, line)


def read_text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, without their ends.

    Raises:
        TraceError: the file cannot be read.
    """
    with _opened(path, "r") as file:
        for line in file:
            yield line.removesuffix("\n")


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a parquet file's columns.

    Raises:
        TraceError: the file cannot be read.
    """
    with _table(path) as (connection, source):
        found = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    return [str(row[0]) for row in found]


def read_parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a parquet file, with these columns of it.

    Raises:
        TraceError: the file cannot be read, or a column is missing.
    """
    there = parquet_columns(path)
    if missing := [name for name in columns if name not in there]:
        raise TraceError(f"{path} has no column {missing[0]!r}; it has {', '.join(there)}")
    chosen = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
    number = 0
    with _table(path) as (connection, source):
        result = connection.execute(f"SELECT {chosen} FROM {source}")
        while rows := result.fetchmany(_ROWS_AT_ONCE):
            for row in rows:
                number += 1
                yield Place(path=path, line=number, unit="row"), dict(zip(columns, row, strict=True))


class _Array:
    """The entries of a JSON array, decoded one by one while the file is read in chunks."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file
        self._decoder = json.JSONDecoder()
        self._buffer, self._at, self._line = "", 0, 1

    def rows(self) -> Iterator[Row]:
        """Yield each entry with its number."""
        self._take("[")
        number = 0
        while self._next() != "]":
            if number:
                self._take(",")
            number += 1
            place = Place(path=self._path, line=number, unit="entry")
            if self._next() != "{":
                raise place.error(self._buffer[self._at : self._at + 80], _OBJECT)
            yield place, self._value()
        self._take("]")
        if self._next():
            raise self._place(self._at).error(self._buffer[self._at : self._at + 80], "the end of the file after ]")

    def _take(self, letter: str) -> None:
        if self._next() != letter:
            shown = self._buffer[self._at : self._at + 80] or "the end of the file"
            raise self._place(self._at).error(shown, f"{letter} of a JSON array")
        self._at += 1

    def _next(self) -> str:
        """Return the next character that is no space, without taking it; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read():
                return ""

    def _value(self) -> dict[str, Any]:
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - 12
                if cut and len(self._buffer) - self._at < _LONGEST_ENTRY and self._read():
                    continue
                shown = self._buffer[max(self._at, error.pos - 20) : error.pos + 40]
                raise self._place(error.pos).error(shown, f"JSON ({error.msg})") from error
            except RecursionError as error:
                raise self._place(self._at).error("brackets in brackets", _OBJECT) from error
            found: dict[str, Any] = value
            return found

    def _read(self) -> bool:
        """Drop what was taken and read on; as much again as is left, so that long entries are not read in bits."""
        rest = self._buffer[self._at :]
        chunk = self._file.read(max(_CHUNK_CHARACTERS, len(rest)))
        if not chunk:
            return False
        self._line += self._buffer.count("\n", 0, self._at)
        self._buffer, self._at = rest + chunk, 0
        return True

    def _place(self, at: int) -> Place:
        return Place(path=self._path, line=self._line + self._buffer.count("\n", 0, at))


def _object(place: Place, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise place.error(line.strip(), _OBJECT) from error
    if not isinstance(value, dict):
        raise place.error(line.strip(), _OBJECT)
    return value


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[IO[Any]]:
    try:
        with path.open(mode, encoding=None if "b" in mode else "utf-8-sig") as file:
            yield file
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not UTF-8 text; unpack it first if it is compressed") from error


@contextmanager
def _table(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield a connection and what to select from; DuckDB's errors name the file."""
    # a path is a pattern to DuckDB, in which brackets take the meaning from a star
    pattern = re.sub(r"([*?\[])", r"[\1]", str(path)).replace("'", "''")
    try:
        with duckdb.connect() as connection:
            yield connection, f"read_parquet('{pattern}')"
    except duckdb.Error as error:
        reason = " ".join(str(error).splitlines()[0].split())
        raise TraceError(f"{path} cannot be read as parquet ({reason}); download it again") from error
