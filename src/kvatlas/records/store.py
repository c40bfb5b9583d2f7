"""The records store: one DuckDB file that an interrupted sweep can resume and SQL can query.

A point is written whole or not at all, in one transaction; a killed run loses only the point it was at.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb

from kvatlas.core.errors import RecordsError
from kvatlas.records.opening import Mode, close_database, open_database, translated
from kvatlas.records.schema import (
    ACCELERATOR,
    PROCESSOR,
    Facts,
    Params,
    Point,
    PointRecord,
    PointStatus,
    Row,
    RunManifest,
    Sample,
)

_INSERT_SAMPLES = """
INSERT INTO samples SELECT ?, ?, unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::DOUBLE[]),
    unnest(?::BIGINT[]), unnest(?::VARCHAR[])
"""
_ROW_COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_SELECT_ROWS = f"""
SELECT {", ".join(_ROW_COLUMNS)}
FROM (SELECT * FROM points WHERE status = 'done') p JOIN samples USING (point_key, seed)
"""
_SELECT_HARDWARE = "SELECT hardware FROM points JOIN runs USING (run_id) WHERE point_key = ? AND points.seed = ?"
_POINT_COLUMNS = "run_id, experiment, model, model_role, strategy, params, seed, status, reason, written_at"


class RecordStore:
    """Runs, points and samples in one file; use it as a context manager, or call `close`.

    Args:
        path: the file. "write" creates it, and its folder, if missing.
        mode: "write" (one process at a time) or "read" (any number, while nobody writes).

    Raises:
        RecordsError: the file is locked, missing, damaged, not ours, or of another schema version.
        OutputError: the file cannot be written.

    Example:
        >>> with RecordStore("out/records.duckdb") as store:            # doctest: +SKIP
        ...     store.begin_run(collect_manifest("kvatlas run", seed=0))
        ...     if not store.is_done(point):
        ...         store.write_point(point, measure(point))
    """

    def __init__(self, path: str | Path, mode: Mode = "write") -> None:
        self.path = Path(path).absolute()
        self.mode: Mode = mode
        self._manifest: RunManifest | None = None
        self._connection: Any = open_database(self.path, mode)

    def __repr__(self) -> str:
        return f"RecordStore({str(self.path)!r}, mode={self.mode!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless.

        Raises:
            OutputError: the disk is full; all finished points are kept.
        """
        if self._connection is not None:
            connection, self._connection = self._connection, None
            close_database(connection, self.path, self.mode)

    def begin_run(self, manifest: RunManifest) -> None:
        """Store the manifest; points written from now on belong to this run and to its seed.

        Raises:
            RecordsError: the store is read-only, or holds a run of this id.
        """
        self._want_write()
        with self._transaction() as connection:
            if connection.execute("SELECT 1 FROM runs WHERE run_id = ?", [manifest.run_id]).fetchone():
                raise RecordsError(f"run {manifest.run_id!r} is already in {self.path}; give each run its own id")
            connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", _run_values(manifest))
        self._manifest = manifest

    def note_model(self, name: str, facts: Facts) -> None:
        """Add a model to the manifest of the current run, where it is loaded later; a known one stays as it is.

        Raises:
            RecordsError: no run was begun.
        """
        run = self._run()
        if name in run.models:
            return
        models = run.models | {name: dict(facts)}
        with self._transaction() as connection:
            connection.execute("UPDATE runs SET models = ? WHERE run_id = ?", [json.dumps(models), run.run_id])
        self._manifest = run.model_copy(update={"models": models})

    def is_done(self, point: Point) -> bool:
        """Whether the file holds this point as done, for the seed of the current run; see `holds`."""
        return self.holds(point, self._run().seed)

    def holds(self, point: Point, seed: int) -> bool:
        """Whether the file holds this point as done.

        Failed and refused points are not, so a resumed sweep tries them again. Points of older files do not name the
        hardware; they are this one if the manifest of their run says that it was the same.
        """
        if self._status(point, seed) == "done":
            return True
        bare = {name: value for name, value in point.params.items() if name not in (PROCESSOR, ACCELERATOR)}
        old = point.model_copy(update={"params": bare})
        if PROCESSOR not in point.params or self._status(old, seed) != "done":
            return False
        (text,) = self._fetch(_SELECT_HARDWARE, [old.key, seed])[0]
        found = json.loads(text)
        device = point.params.get(ACCELERATOR, "cpu")
        return (found.get("cpu_model"), found.get("device")) == (point.params[PROCESSOR], device)

    def write_point(
        self, point: Point, samples: Iterable[Sample] = (), status: PointStatus = "done", reason: str = ""
    ) -> None:
        """Write one point with its samples in one transaction; replaces a failed or refused one.

        Args:
            point: the setting.
            samples: raw numbers, (metric, index) unique. `rows` leaves out those of failed points.
            status: how the point ended.
            reason: one line, what is missing or went wrong; required unless done.

        Raises:
            RecordsError: no run was begun, the point is already done, or samples and status do not fit.
            OutputError: the disk is full; the file keeps all earlier points.
        """
        run, samples = self._run(), list(samples)
        _check_outcome(point, samples, status, reason)
        with self._transaction() as connection:
            if self._status(point, run.seed) == "done":
                raise RecordsError(
                    f"point {_label(point)} with seed {run.seed} is already done in {self.path}; "
                    "ask is_done first, or use another file"
                )
            for table in ("samples", "points"):
                connection.execute(f"DELETE FROM {table} WHERE point_key = ? AND seed = ?", [point.key, run.seed])
            values = _point_values(point, run, status, reason)
            connection.execute("INSERT INTO points VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            connection.execute(_INSERT_SAMPLES, [point.key, run.seed, *_columns(samples)])

    def rows(
        self,
        experiment: str | None = None,
        *,
        model: str | None = None,
        model_role: str | None = None,
        strategy: str | None = None,
        metric: str | None = None,
    ) -> list[Row]:
        """Return the samples of all done points that match, ordered by time of writing, metric and index."""
        wanted = {"experiment": experiment, "model": model, "model_role": model_role, "strategy": strategy}
        where, values = _where({**wanted, "metric": metric})
        sql = f"{_SELECT_ROWS} {where} ORDER BY written_at, point_key, metric, index"
        parsed: dict[str, Params] = {}
        return [_row(record, parsed) for record in self._fetch(sql, values)]

    def points(self, experiment: str | None = None, *, status: PointStatus | None = None) -> list[PointRecord]:
        """Return all points, whatever their status, in order of writing."""
        where, values = _where({"experiment": experiment, "status": status})
        sql = f"SELECT {_POINT_COLUMNS} FROM points {where} ORDER BY written_at, point_key"
        return [_point_record(record) for record in self._fetch(sql, values)]

    def runs(self) -> list[RunManifest]:
        """Return the manifests of all runs, oldest first."""
        return [_manifest(record) for record in self._fetch("SELECT * FROM runs ORDER BY started_at, run_id", [])]

    def _status(self, point: Point, seed: int) -> str | None:
        sql = "SELECT status FROM points WHERE point_key = ? AND seed = ?"
        found = self._fetch(sql, [point.key, seed])
        return str(found[0][0]) if found else None

    def _fetch(self, sql: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        with translated(self.path):
            records: list[tuple[Any, ...]] = self._open().execute(sql, list(values)).fetchall()
        return records

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        connection = self._open()
        with translated(self.path):
            connection.begin()
            try:
                yield connection
                connection.commit()
            except BaseException:
                with suppress(duckdb.Error):
                    connection.rollback()
                raise

    def _open(self) -> Any:
        if self._connection is None:
            raise RecordsError(f"records file {self.path} is closed; open it again")
        return self._connection

    def _want_write(self) -> None:
        if self.mode != "write":
            raise RecordsError(f"records file {self.path} is open to read; open it with mode='write'")

    def _run(self) -> RunManifest:
        self._want_write()
        if self._manifest is None:
            raise RecordsError(f"no run has begun on {self.path}; call begin_run(manifest) first")
        return self._manifest


def _label(point: Point) -> str:
    params = ", ".join(f"{name}={value}" for name, value in point.params.items())
    return f"{point.experiment}/{point.model}/{point.strategy}({params})"


def _check_outcome(point: Point, samples: Sequence[Sample], status: PointStatus, reason: str) -> None:
    if status == "done" and not samples:
        raise RecordsError(f"point {_label(point)} is done but has no samples; write it as failed, with a reason")
    if status != "done" and not reason.strip():
        raise RecordsError(f"point {_label(point)} is {status} without a reason; say what is missing")
    seen: set[tuple[str, int]] = set()
    for sample in samples:
        if (sample.metric, sample.index) in seen:
            raise RecordsError(
                f"point {_label(point)} has two samples {sample.metric!r} of index {sample.index}; "
                "number repeats and prompts"
            )
        seen.add((sample.metric, sample.index))


def _where(wanted: dict[str, str | None]) -> tuple[str, list[str]]:
    given = {column: value for column, value in wanted.items() if value is not None}
    clause = " AND ".join(f"{column} = ?" for column in given)
    return (f"WHERE {clause}" if clause else ""), list(given.values())


def _run_values(manifest: RunManifest) -> list[object]:
    facts = manifest.model_dump()
    return [json.dumps(value) if isinstance(value, dict) else value for value in facts.values()]


def _point_values(point: Point, run: RunManifest, status: PointStatus, reason: str) -> list[object]:
    setting = [point.experiment, point.model, point.model_role, point.strategy, json.dumps(point.params)]
    written_at = datetime.now(UTC).isoformat(timespec="microseconds")
    return [point.key, run.seed, run.run_id, *setting, status, " ".join(reason.split()), written_at]


def _columns(samples: Sequence[Sample]) -> list[list[object]]:
    return [[getattr(sample, name) for sample in samples] for name in Sample.model_fields]


def _row(record: tuple[Any, ...], parsed: dict[str, Params]) -> Row:
    values = dict(zip(_ROW_COLUMNS, record, strict=True))
    text = values["params"]
    if text not in parsed:
        parsed[text] = json.loads(text)
    return Row(**(values | {"params": parsed[text]}))


def _point_record(record: tuple[Any, ...]) -> PointRecord:
    run_id, experiment, model, role, strategy, params, seed, status, reason, written_at = record
    settings = json.loads(params)
    point = Point(experiment=experiment, model=model, model_role=role, strategy=strategy, params=settings)
    return PointRecord(point=point, seed=seed, run_id=run_id, status=status, reason=reason, written_at=written_at)


def _manifest(record: tuple[Any, ...]) -> RunManifest:
    values = dict(zip(RunManifest.model_fields, record, strict=True))
    for name in ("versions", "hardware", "models"):
        values[name] = json.loads(values[name])
    return RunManifest(**values)
