import os
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.unit.records.building import manifest, point, samples

from kvatlas.core.errors import OutputError, RecordsError
from kvatlas.records.schema import Point, Sample
from kvatlas.records.store import RecordStore


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "records.duckdb"


@pytest.fixture
def store(path):
    with RecordStore(path) as store:
        store.begin_run(manifest())
        yield store


def test_rows_come_back_flat_and_typed(store):
    store.write_point(point(1), samples())
    row = store.rows()[1]
    assert (row.run_id, row.point_key, row.seed) == ("run", point(1).key, 0)
    assert (row.experiment, row.model, row.model_role, row.strategy) == ("ttft", "tiny", "speed", "full")
    assert row.params == {"prompt_tokens": 1}
    assert (row.metric, row.unit, row.value, row.index, row.provenance) == ("ttft", "s", 1 / 3, 1, "measured")


HERE = {"processor": "a cpu"}


def on(point, **hardware):
    return point.model_copy(update={"params": point.params | hardware})


@pytest.mark.parametrize(
    ("named", "recorded", "found"),
    [
        (HERE, {"cpu_model": "a cpu", "device": "cpu"}, True),
        (HERE, {"cpu_model": "another", "device": "cpu"}, False),
        (HERE, {"cpu_model": "a cpu", "device": "cuda"}, False),
        (HERE, {}, False),
        (HERE | {"accelerator": "a gpu"}, {"cpu_model": "a cpu", "device": "a gpu"}, True),
        (HERE | {"accelerator": "a gpu"}, {"cpu_model": "a cpu", "device": "cuda"}, False),
        (HERE | {"accelerator": "a gpu"}, {"cpu_model": "a cpu", "device": "cpu"}, False),
    ],
)
def test_an_older_point_is_this_one_if_its_manifest_names_the_same_hardware(path, named, recorded, found):
    with RecordStore(path) as store:
        store.begin_run(manifest(hardware=recorded))
        store.write_point(point(1), samples())
        store.write_point(point(2), status="failed", reason="it broke")
        store.begin_run(manifest("later", hardware={"cpu_model": "a cpu"}))
        assert store.is_done(on(point(1), **named)) is found
        assert not store.is_done(on(point(2), **named)) and not store.is_done(on(point(3), **named))
        if not found:
            store.write_point(on(point(1), **named), samples())
            assert store.is_done(on(point(1), **named)) and store.is_done(point(1))


def test_each_hardware_measures_for_itself(store):
    here, there = on(point(1), **HERE), on(point(1), processor="another")
    store.write_point(here, samples())
    assert store.is_done(here) and not store.is_done(there)
    store.write_point(there, samples())
    assert {row.params["processor"] for row in store.rows()} == {"a cpu", "another"}


def test_rows_filter(store):
    store.write_point(point(1), samples(2))
    store.write_point(point(2, experiment="itl", strategy="snapkv"), samples(3, "itl") + samples(1, "peak"))
    assert len(store.rows()) == 6
    assert len(store.rows("itl")) == 4
    assert len(store.rows("itl", metric="peak")) == 1
    assert len(store.rows(strategy="full", model="tiny", model_role="speed")) == 2
    assert store.rows(model="other") == []


def test_runs_come_back_equal(store, path):
    assert store.runs() == [manifest()]
    store.begin_run(manifest("later", started_at="2026-11-22T00:00:00+00:00", commit=None, commit_dirty=None))
    store.close()
    with RecordStore(path, mode="read") as reader:
        assert [run.run_id for run in reader.runs()] == ["run", "later"]
        assert reader.runs()[1].commit is None


def test_a_model_that_is_loaded_later_joins_the_manifest(store):
    known = dict(manifest().models)
    store.note_model("later", {"layers": 2})
    store.note_model("later", {"layers": 3})
    for name in known:
        store.note_model(name, {})
    store.write_point(point(1), samples())
    (run,) = store.runs()
    assert run.models == known | {"later": {"layers": 2}}


def test_a_sweep_resumes(store, path):
    store.write_point(point(1), samples())
    store.write_point(point(2), status="failed", reason="out of\nmemory")
    store.close()
    with RecordStore(path) as again:
        again.begin_run(manifest("second"))
        assert [again.is_done(point(number)) for number in (1, 2, 3)] == [True, False, False]


@pytest.mark.parametrize("change", [{"model": "other"}, {"params": {"prompt_tokens": 2}}, {"strategy": "h2o"}])
def test_another_setting_is_not_done(store, change):
    store.write_point(point(1), samples())
    assert not store.is_done(point(1, **change))


def test_another_seed_is_not_done(store):
    store.write_point(point(1), samples())
    store.begin_run(manifest("other", seed=1))
    assert not store.is_done(point(1))
    store.write_point(point(1), samples())
    assert {row.seed for row in store.rows()} == {0, 1}
    assert len(store.rows()) == 6


def test_a_failed_point_is_replaced(store):
    store.write_point(point(1), samples(1), status="failed", reason="killed")
    assert store.rows() == []
    assert [(p.status, p.reason) for p in store.points()] == [("failed", "killed")]
    store.write_point(point(1), samples(2))
    assert [(p.status, p.reason, p.point) for p in store.points()] == [("done", "", point(1))]
    assert len(store.rows()) == 2


def test_points_filter_by_status(store):
    store.write_point(point(1), samples())
    store.write_point(point(2), status="refused", reason="needs\n  a GPU")
    assert [p.reason for p in store.points(status="refused")] == ["needs a GPU"]
    assert [p.run_id for p in store.points("ttft")] == ["run", "run"]
    assert store.points("itl") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": []}, "has no samples"),
        ({"samples": [], "status": "failed"}, "without a reason"),
        ({"samples": samples(1) * 2}, "two samples 'ttft' of index 0"),
    ],
)
def test_a_point_that_does_not_fit_is_refused(store, arguments, message):
    with pytest.raises(RecordsError, match=message):
        store.write_point(point(), **arguments)
    assert store.points() == []


def test_a_done_point_is_never_overwritten(store):
    store.write_point(point(1), samples())
    with pytest.raises(RecordsError, match="already done"):
        store.write_point(point(1), status="failed", reason="late")
    assert len(store.rows()) == 3


def test_a_run_id_is_used_once(store):
    with pytest.raises(RecordsError, match="already in"):
        store.begin_run(manifest())
    assert len(store.runs()) == 1


def test_writing_needs_a_run(path):
    with RecordStore(path) as store, pytest.raises(RecordsError, match="begin_run"):
        store.write_point(point(), samples())


def test_a_reader_cannot_write(store, path):
    store.close()
    with RecordStore(path, mode="read") as reader:
        with pytest.raises(RecordsError, match="mode='write'"):
            reader.begin_run(manifest("x"))
        with pytest.raises(RecordsError, match="mode='write'"):
            reader.write_point(point(), samples())


def test_a_closed_store_says_so(store):
    store.close()
    store.close()
    with pytest.raises(RecordsError, match="is closed"):
        store.rows()


def test_an_interrupt_leaves_whole_points_only(store, monkeypatch):
    store.write_point(point(1), samples())
    monkeypatch.setattr("kvatlas.records.store._columns", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_point(point(2), samples())
    monkeypatch.undo()
    assert [p.point for p in store.points()] == [point(1)]
    store.write_point(point(2), samples())
    assert len(store.rows()) == 6


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SAMPLES = st.lists(
    st.builds(
        Sample,
        metric=TEXT,
        unit=st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
        value=st.floats(allow_nan=False, allow_infinity=False),
        index=st.integers(0, 2**63 - 1),
        provenance=st.sampled_from(["measured", "estimated", "emulated"]),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda sample: (sample.metric, sample.index),
)
POINTS = st.builds(
    Point,
    experiment=TEXT,
    model=TEXT,
    model_role=st.sampled_from(["quality", "speed"]),
    strategy=TEXT,
    params=st.dictionaries(TEXT, NUMBERS | TEXT, max_size=4),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(point=POINTS, samples=SAMPLES, seed=st.integers(0, 2**63 - 1))
def test_any_point_round_trips(store, point, samples, seed):
    store.begin_run(manifest(f"run-{len(store.runs())}", seed=seed))
    if store.is_done(point):
        return
    store.write_point(point, samples)
    assert store.is_done(point)
    stored = [r for r in store.points() if r.point.key == point.key and r.seed == seed]
    assert [record.point for record in stored] == [point]
    rows = [r for r in store.rows(point.experiment) if r.point_key == point.key and r.seed == seed]
    back = [{name: getattr(row, name) for name in Sample.model_fields} for row in rows]
    assert sorted(back, key=repr) == sorted((sample.model_dump() for sample in samples), key=repr)
    assert all(row.params == point.params for row in rows)


HEAD = """
import os, sys
from kvatlas.core.errors import OutputError, RecordsError
from kvatlas.records.store import RecordStore
from tests.unit.records.building import manifest, point, samples
"""


def run_python(code, *arguments):
    command = [sys.executable, "-c", HEAD + textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_a_killed_run_leaves_whole_points(path):
    done = run_python(
        """
        store = RecordStore(sys.argv[1])
        store.begin_run(manifest())
        for number in range(5):
            store.write_point(point(number), samples(50))
        connection = store._connection
        connection.begin()
        connection.execute("INSERT INTO points SELECT * REPLACE ('half' AS point_key) FROM points LIMIT 1")
        os.kill(os.getpid(), 9)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL
    with RecordStore(path, mode="read") as reader:
        assert len(reader.rows()) == 250
        assert len(reader.points()) == 5
    with RecordStore(path) as again:
        again.begin_run(manifest("second"))
        assert all(again.is_done(point(number)) for number in range(5))


def test_a_second_process_is_refused(store, path):
    code = """
        for mode in ("write", "read"):
            try:
                RecordStore(sys.argv[1], mode)
            except RecordsError as error:
                print(error)
        """
    lines = run_python(code, path).stdout.splitlines()
    assert len(lines) == 2
    assert all("in use by another process (process " in line and "two runs on one" in line for line in lines)


def test_a_second_store_in_this_process_is_refused_and_drops_no_lock(store, path):
    with pytest.raises(RecordsError, match="already open in this process"):
        RecordStore(path, mode="read")
    assert "in use" in run_python("RecordStore(sys.argv[1])", path).stderr


def test_two_processes_may_read(store, path):
    store.write_point(point(), samples())
    store.close()
    with RecordStore(path, mode="read"):
        done = run_python("print(len(RecordStore(sys.argv[1], 'read').rows()))", path)
    assert done.stdout.strip() == "3"


def test_a_full_disk_keeps_the_finished_points(path):
    done = run_python(
        """
        import resource, signal
        store = RecordStore(sys.argv[1])
        store.begin_run(manifest())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            for number in range(100):
                store.write_point(point(number), samples(2000))
        except OutputError as error:
            print(number)
            print(error)
        """,
        path,
    )
    finished, message = done.stdout.splitlines()
    assert "cannot be written" in message and "finished points are kept" in message
    with RecordStore(path, mode="read") as reader:
        assert len(reader.points()) == int(finished) > 0
        assert len(reader.rows()) == 2000 * int(finished)


def test_errors_are_one_line(tmp_path):
    with pytest.raises(OutputError, match="is a folder; name a file in it") as caught:
        RecordStore(tmp_path)
    assert "\n" not in str(caught.value)
