import os
import subprocess
import sys

import duckdb
import pytest
from tests.unit.records.building import manifest, point, samples

from kvatlas.core.errors import OutputError, RecordsError
from kvatlas.records.opening import _translate, translated
from kvatlas.records.store import RecordStore


@pytest.fixture
def path(tmp_path):
    with RecordStore(tmp_path / "records.duckdb") as store:
        store.begin_run(manifest())
        store.write_point(point(), samples(2000))
    return tmp_path / "records.duckdb"


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(RecordsError, match="does not exist; run an experiment first"):
        RecordStore(tmp_path / "none.duckdb", mode="read")
    assert not (tmp_path / "none.duckdb").exists()


@pytest.mark.parametrize(("mode", "error"), [("write", OutputError), ("read", RecordsError)])
def test_a_folder_is_not_a_file(tmp_path, mode, error):
    with pytest.raises(error, match="is a folder; name a file"):
        RecordStore(tmp_path, mode)


@pytest.mark.parametrize("mode", ["write", "read"])
@pytest.mark.parametrize(
    "content", [b"", b"text", b"TIMESTAMP,ContextTokens\n" * 99, b"SQLite format 3\x00" + bytes(4096)]
)
def test_a_foreign_file_is_refused_and_kept(tmp_path, mode, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RecordsError, match="holds no records; delete it, or name another file"):
        RecordStore(path, mode)
    assert path.read_bytes() == content


def test_a_pipe_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        RecordStore(tmp_path / "pipe")


@pytest.mark.parametrize("mode", ["write", "read"])
@pytest.mark.parametrize("table", ["CREATE TABLE meta (a INTEGER)", "CREATE TABLE prices (a INTEGER)"])
def test_a_duckdb_file_that_is_not_ours_is_refused(tmp_path, mode, table):
    path = tmp_path / "other.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(table)
    with pytest.raises(RecordsError, match="not a kvatlas records file"):
        RecordStore(path, mode)


def test_an_empty_database_is_ours_to_fill(tmp_path):
    path = tmp_path / "empty.duckdb"
    duckdb.connect(str(path)).close()
    with pytest.raises(RecordsError, match="tables: none"):
        RecordStore(path, mode="read")
    with RecordStore(path) as store:
        assert store.rows() == []


@pytest.mark.parametrize(("version", "step"), [(2, "upgrade kvatlas"), (0, "with the kvatlas that wrote it")])
@pytest.mark.parametrize("mode", ["write", "read"])
def test_another_schema_version_is_refused(path, version, step, mode):
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"UPDATE meta SET schema_version = {version}")
    with pytest.raises(RecordsError, match=f"schema version {version}, this kvatlas knows 1; .*{step}"):
        RecordStore(path, mode)


def test_a_refused_file_can_be_opened_after_repair(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE meta SET schema_version = 2")
    with pytest.raises(RecordsError):
        RecordStore(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE meta SET schema_version = 1")
    with RecordStore(path) as store:
        assert len(store.rows()) == 2000


@pytest.mark.parametrize("kept", [16, 5000, 0.5])
def test_a_cut_file_is_refused(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    message = r"cannot be used .*; restore a copy, or start a new file"
    with pytest.raises(RecordsError, match=message), RecordStore(path) as store:
        store.rows()


def test_damaged_blocks_are_refused(path):
    data = bytearray(path.read_bytes())
    for offset in range(12288, len(data), 509):
        data[offset] ^= 0xFF
    path.write_bytes(bytes(data))
    with (
        pytest.raises(RecordsError, match=r"Corrupt database file.*restore a copy"),
        RecordStore(path) as store,
    ):
        store.rows()


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be created"):
        RecordStore(tmp_path / "file" / "records.duckdb")
    with pytest.raises(OutputError, match="cannot be created"):
        RecordStore("/proc/kvatlas/records.duckdb")


def test_permissions_are_explained(path, monkeypatch):
    """The superuser may write anywhere, so the answer of the system is faked."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="read-only; choose another file"):
        RecordStore(path)
    with pytest.raises(OutputError, match="cannot be written; choose another one"):
        RecordStore(path.parent / "new.duckdb")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("IO Error: Could not write file: No space left on device", OutputError),
        ('IO Error: Cannot open file "x": Permission denied', OutputError),
        ("IO Error: Could not set lock on file: Conflicting lock", RecordsError),
        ("Internal Error: odd\nstack", RecordsError),
        ("", RecordsError),
    ],
)
def test_errors_of_the_database_become_one_line(tmp_path, text, kind):
    error = _translate(tmp_path, text)
    assert isinstance(error, kind)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("Query interrupted"), duckdb.InterruptException("INTERRUPT Error: Interrupted!")]
)
def test_ctrl_c_stays_ctrl_c(tmp_path, error):
    """A sweep that notes failed points must not take it for a failure."""
    with pytest.raises(KeyboardInterrupt), translated(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="other"), translated(tmp_path):
        raise RuntimeError("other")


WRITER = """
import resource, sys
from tests.unit.records.building import manifest, point, samples
from kvatlas.core.errors import OutputError
from kvatlas.records.store import RecordStore
written = 0
try:
    with RecordStore(sys.argv[1]) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        store.begin_run(manifest())
        for number in range(int(sys.argv[3])):
            store.write_point(point(number=number), samples(500))
            written += 1
except OutputError as error:
    print(written, error)
"""


@pytest.mark.parametrize(("room", "points"), [(9_000, 3), (150_000, 3), (300_000, 20)])
def test_where_a_disk_is_full_it_says_so_and_keeps_every_finished_point(tmp_path, room, points):
    """A limit on the size of a file stands in for the disk's end: while a point is written, or when the file closes."""
    path = tmp_path / "r.duckdb"
    command = [sys.executable, "-c", WRITER, str(path), str(room), str(points)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    written, _, said = done.stdout.partition(" ")
    assert "cannot be written" in said and "free some space and run again" in said
    with RecordStore(path) as store:
        assert len(store.points()) == int(written)
        assert len(store.rows()) == 500 * int(written)


def test_a_file_that_cannot_be_begun_leaves_nothing(tmp_path):
    script = f"""
import resource
from kvatlas.core.errors import OutputError
from kvatlas.records.store import RecordStore
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    RecordStore({str(tmp_path / "a" / "b" / "r.duckdb")!r})
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=100)
    assert "free some space" in done.stdout
    assert list(tmp_path.iterdir()) == []
