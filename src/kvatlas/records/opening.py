"""Opening a records file: every way it can go wrong ends in one line that says what to do.

DuckDB allows one writing process or many reading ones. Its lock is a POSIX lock, which a process loses as
soon as it closes *any* handle on the file; so a file that is open here is refused before it is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import duckdb

from kvatlas.core.errors import KvatlasError, OutputError, RecordsError
from kvatlas.core.folders import missing_folders, remove_empty

Mode = Literal["write", "read"]

APPLICATION = "kvatlas"
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE meta (application VARCHAR NOT NULL, schema_version INTEGER NOT NULL);
CREATE TABLE runs (
    run_id VARCHAR NOT NULL, started_at VARCHAR NOT NULL, command VARCHAR NOT NULL,
    commit VARCHAR, commit_dirty BOOLEAN, seed BIGINT NOT NULL,
    versions VARCHAR NOT NULL, hardware VARCHAR NOT NULL, models VARCHAR NOT NULL);
CREATE TABLE points (
    point_key VARCHAR NOT NULL, seed BIGINT NOT NULL, run_id VARCHAR NOT NULL,
    experiment VARCHAR NOT NULL, model VARCHAR NOT NULL, model_role VARCHAR NOT NULL,
    strategy VARCHAR NOT NULL, params VARCHAR NOT NULL,
    status VARCHAR NOT NULL, reason VARCHAR NOT NULL, written_at VARCHAR NOT NULL);
CREATE TABLE samples (
    point_key VARCHAR NOT NULL, seed BIGINT NOT NULL, metric VARCHAR NOT NULL, unit VARCHAR NOT NULL,
    value DOUBLE NOT NULL, index BIGINT NOT NULL, provenance VARCHAR NOT NULL);
"""

# One thread and a small cache: the machine is being measured. No extensions: nothing is fetched.
_CONFIG = {
    "threads": 1,
    "memory_limit": "1GB",
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
_OPEN_HERE: set[Path] = set()


def open_database(path: Path, mode: Mode) -> Any:
    """Return a DuckDB connection to a records file of this schema version; "write" creates it and its folder.

    Raises:
        RecordsError: locked, missing (to read), not a DuckDB file, damaged, not ours, or of another version.
        OutputError: the file or its folder cannot be written, or the disk is full.
    """
    if path in _OPEN_HERE:
        raise RecordsError(f"records file {path} is already open in this process; close it first, or use another file")
    try:
        made, fresh = missing_folders(path.parent), not path.exists()
        _check_path(path, mode)
    except OSError as error:  # a name that is too long, a loop of links
        raise RecordsError(f"records file {path} cannot be used ({error.strerror}); choose another path") from error
    try:
        with translated(path):
            connection = duckdb.connect(str(path), read_only=mode == "read", config=_CONFIG)
        try:
            with translated(path):
                _check_schema(connection, path, mode)
        except BaseException:
            connection.close()
            raise
    except OutputError:
        if fresh:
            remove_database(path, made)
        raise
    _OPEN_HERE.add(path)
    return connection


def remove_database(path: Path, folders: Sequence[Path] = ()) -> None:
    """Remove a records file in which nothing has begun, its log, and the folders that were made for it."""
    for each in (path, path.with_name(f"{path.name}.wal")):
        each.unlink(missing_ok=True)
    remove_empty(folders)


def close_database(connection: Any, path: Path, mode: Mode) -> None:
    """Fold the write-ahead log into the file and close the connection.

    Raises:
        OutputError: the disk is full; the log stays beside the file, and whoever opens it next has all points.
    """
    _OPEN_HERE.discard(path)
    with translated(path):
        try:
            if mode == "write":
                connection.execute("CHECKPOINT")  # closing would do it too, but say nothing where it cannot
        finally:
            connection.close()


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn DuckDB's errors into ours, and Ctrl-C, which it reports as a RuntimeError, back into itself."""
    try:
        yield
    except (duckdb.Error, RuntimeError) as error:
        if "interrupted" in str(error).lower():
            raise KeyboardInterrupt from error
        if isinstance(error, duckdb.Error):
            raise _translate(path, str(error)) from error
        raise


def _translate(path: Path, text: str) -> KvatlasError:
    line = text.splitlines()[0] if text else "unknown error"
    if "Could not set lock" in text:
        holder = text.partition("(PID ")[2].partition(")")[0]
        by = f" (process {holder})" if holder else ""
        return RecordsError(
            f"records file {path} is in use by another process{by}: two runs on one records file; "
            "wait for it to end, or use another file"
        )
    if any(sign in text for sign in ("No space left", "File too large", "Could not write", "quota exceeded")):
        return OutputError(
            f"records file {path} cannot be written ({line}); free some space and run again: finished points are kept"
        )
    if "Permission denied" in text or "Read-only file system" in text:
        return OutputError(f"records file {path} cannot be written ({line}); choose another folder")
    return RecordsError(f"records file {path} cannot be used ({line}); restore a copy, or start a new file")


def _check_path(path: Path, mode: Mode) -> None:
    """Refuse what DuckDB would explain badly, or would try to open with a foreign reader."""
    refusal = OutputError if mode == "write" else RecordsError
    if path.is_dir():
        raise refusal(f"records file {path} is a folder; name a file in it, such as {path / 'records.duckdb'}")
    if not path.exists():
        if mode == "read":
            raise RecordsError(f"records file {path} does not exist; run an experiment first, or check the path")
        _check_folder(path.parent)
    elif not path.is_file():
        raise refusal(f"records file {path} is not a regular file; name another one")
    else:
        _check_header(path, mode)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "too deep"
        raise OutputError(f"folder {folder} cannot be created ({why}); choose another one") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"folder {folder} cannot be written; choose another one, or change its permissions")


def _check_header(path: Path, mode: Mode) -> None:
    try:
        with path.open("rb") as file:
            header = file.read(16)
    except OSError as error:
        raise RecordsError(f"records file {path} cannot be read ({error.strerror}); check its permissions") from error
    if mode == "write" and not os.access(path, os.W_OK):
        raise OutputError(f"records file {path} is read-only; choose another file, or change its permissions")
    if header[8:12] != b"DUCK":
        kind = "empty" if not header else "not a DuckDB database"
        raise RecordsError(f"{path} is {kind}, so it holds no records; delete it, or name another file")


def _check_schema(connection: Any, path: Path, mode: Mode) -> None:
    tables = {name for (name,) in connection.execute("SELECT table_name FROM information_schema.tables").fetchall()}
    if not tables and mode == "write":
        _create_schema(connection)
        return
    try:
        application, version = connection.execute("SELECT application, schema_version FROM meta").fetchone() or ("", 0)
    except (duckdb.CatalogException, duckdb.BinderException):
        application, version = "", 0
    if application != APPLICATION:
        found = ", ".join(sorted(tables)) or "none"
        raise RecordsError(
            f"{path} is a DuckDB file, but not a kvatlas records file (tables: {found}); name another file"
        )
    if version > SCHEMA_VERSION:
        step = "upgrade kvatlas to read it"
    else:
        step = "read it with the kvatlas that wrote it, or start a new file"
    if version != SCHEMA_VERSION:
        raise RecordsError(f"{path} has schema version {version}, this kvatlas knows {SCHEMA_VERSION}; {step}")


def _create_schema(connection: Any) -> None:
    connection.begin()
    connection.execute(SCHEMA)
    connection.execute("INSERT INTO meta VALUES (?, ?)", [APPLICATION, SCHEMA_VERSION])
    connection.commit()
