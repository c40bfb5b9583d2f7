"""Rows of large files: the same ones however the file is cut into chunks, and errors that name the place."""

import json

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from kvatlas.core.errors import TraceError
from kvatlas.workloads import rows
from kvatlas.workloads.rows import parquet_columns, read_json_rows, read_parquet_rows, read_text_lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=6)


def read(path):
    return [row for _, row in read_json_rows(path)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(objects=OBJECTS, chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_an_array_is_the_same_in_chunks_of_any_size(tmp_path, monkeypatch, objects, chunk, indent, ascii_only):
    monkeypatch.setattr(rows, "_CHUNK_CHARACTERS", chunk)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(objects, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert read(path) == objects


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(objects=OBJECTS)
def test_lines_are_the_same_as_an_array(tmp_path, objects):
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(map(json.dumps, objects)), encoding="utf-8")
    assert read(path) == objects


def test_an_array_is_not_read_further_than_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_CHUNK_CHARACTERS", 64)
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, {"a": 2},' + " " * 1000 + "broken")
    found = read_json_rows(path)
    assert next(found)[1] == {"a": 1}
    assert next(found)[1] == {"a": 2}


@pytest.mark.parametrize("chunk", [3, 2**20])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1},\n {"a": }]', r"line 2: got '.*', expected JSON \(Expecting value\); mend or remove the line"),
        ('[{"a": 1},\n 7]', r"entry 2: got '7\]', expected a JSON object; mend or remove the entry"),
        ('[{"a": 1} {"a": 2}]', r"line 1: .*expected , of a JSON array"),
        ('[{"a": 1}', r"line 1: got 'the end of the file', expected , of a JSON array"),
        ('[{"a": "never closed}]', r"expected JSON \(Unterminated string"),
        ('[{"a": 1}]\n[]', r"line 2: .*expected the end of the file after \]"),
        ('{"a": 1}\n\n[1]', r"line 3: got '\[1\]', expected a JSON object"),
        ('{"a": 1}\nplain', r"line 2: got 'plain', expected a JSON object"),
        ("[" * 3000, "entry 1: .*expected a JSON object"),
        ('[{"a":' + "[" * 100_000 + "]", "expected"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, monkeypatch, chunk, text, said):
    monkeypatch.setattr(rows, "_CHUNK_CHARACTERS", chunk)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(TraceError, match=said):
        read(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(TraceError, match="Is a directory"):
        list(read_text_lines(tmp_path))
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"a": "\xff\xfe"}]')
    with pytest.raises(TraceError, match="not UTF-8 text; unpack it"):
        read(path)


def write_parquet(path, select):
    with duckdb.connect() as connection:
        connection.execute(f"COPY ({select}) TO '{path}' (FORMAT parquet)")
    return path


def test_parquet_rows_keep_order_and_number(tmp_path):
    path = write_parquet(tmp_path / "a[1]*.parquet", 'SELECT i AS n, \'x\' || i AS "na""me" FROM range(3000) t(i)')
    found = list(read_parquet_rows(path, ['na"me', "n"]))
    assert [row["n"] for _, row in found] == list(range(3000))
    assert found[2][1] == {'na"me': "x2", "n": 2}
    assert [place.line for place, _ in found] == list(range(1, 3001))
    assert parquet_columns(path) == ["n", 'na"me']


def test_parquet_that_is_broken_or_lacks_a_column_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", "SELECT 1 AS n")
    with pytest.raises(TraceError, match=r"a\.parquet has no column 'text'; it has n"):
        list(read_parquet_rows(path, ["text"]))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TraceError, match="cannot be read as parquet"):
        list(read_parquet_rows(path, ["n"]))
