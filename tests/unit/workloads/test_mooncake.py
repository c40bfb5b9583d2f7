import json

import pytest

from kvatlas.core.errors import TraceError
from kvatlas.workloads.mooncake import read_mooncake

GOOD = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}


@pytest.fixture
def read(tmp_path):
    def read(*lines, **arguments):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "x.jsonl").write_text("\n".join(texts))
        return read_mooncake(tmp_path / "x.jsonl", **arguments)

    return read


def test_milliseconds_become_seconds_after_the_first(read):
    trace = read(GOOD | {"timestamp": 1500}, GOOD | {"timestamp": 2750.5})
    assert [r.arrival_s for r in trace.requests] == [0.0, 1.2505]
    first = trace.requests[0]
    assert (first.prompt_tokens, first.output_tokens, first.prefix_hashes) == (600, 5, (0, 1))
    assert (first.hash_block_tokens, first.session) == (512, None)


def test_sessions_missing_hashes_and_full_blocks_only(read):
    trace = read(GOOD | {"session_id": 7}, GOOD | {"hash_ids": []}, GOOD | {"hash_ids": [0]})
    assert [r.session for r in trace.requests] == ["7", None, None]
    assert [r.prefix_hashes for r in trace.requests] == [(0, 1), (), (0,)]
    assert [r.hash_block_tokens for r in trace.requests] == [512, None, 512]


def test_another_block_size_must_be_named(read):
    line = GOOD | {"input_length": 40, "hash_ids": [1, 2, 3]}
    with pytest.raises(TraceError, match="got '3 hash_ids', expected 1 for 40 tokens in blocks of 512; is hash_block"):
        read(line)
    assert read(line, hash_block_tokens=16).requests[0].hash_block_tokens == 16
    with pytest.raises(TraceError, match="want at least 1"):
        read(line, hash_block_tokens=0)


def test_an_unsorted_file_is_sorted_with_a_note(read):
    trace = read(GOOD | {"timestamp": 9}, GOOD)
    assert [r.number for r in trace.requests] == [1, 0]
    assert "was sorted" in trace.notes[0]


@pytest.mark.parametrize(
    ("line", "value", "expected"),
    [
        ("{", "'{'", "a JSON object like"),
        ("[1]", "'[1]'", "a JSON object like"),
        ("[" * 100_000, "'[[[", "a JSON object like"),
        ({"timestamp": 1}, "['timestamp']", "the field 'input_length'"),
        (GOOD | {"timestamp": "0"}, "'0'", "timestamp in milliseconds"),
        (GOOD | {"timestamp": -1}, "-1", "timestamp in milliseconds"),
        (GOOD | {"timestamp": float("nan")}, "nan", "timestamp in milliseconds"),
        (GOOD | {"timestamp": True}, "True", "timestamp in milliseconds"),
        (GOOD | {"input_length": 0}, "0", "input_length as a whole number from 1"),
        (GOOD | {"input_length": 600.0}, "600.0", "input_length as a whole number"),
        (GOOD | {"output_length": None}, "None", "output_length as a whole number"),
        (GOOD | {"hash_ids": 3}, "3", "hash_ids as a list of whole numbers"),
        (GOOD | {"hash_ids": [0, "1"]}, "[0, '1']", "hash_ids as a list of whole numbers"),
        (GOOD | {"session_id": [1]}, "[1]", "session_id as a text or whole number"),
    ],
)
def test_a_malformed_line_is_named(read, line, value, expected):
    with pytest.raises(TraceError) as caught:
        read(GOOD, line)
    message = str(caught.value)
    assert "x.jsonl, line 2: got " + value in message
    assert expected in message
    assert len(message) < 400
