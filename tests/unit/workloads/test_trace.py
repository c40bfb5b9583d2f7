import gzip
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.workloads.excerpts import load_excerpt
from kvatlas.workloads.trace import Trace, TraceRequest, read_trace, scale_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
MOONCAKE = '{"timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [3, 4]}\n'


def request(number=0, **changes):
    values = {"arrival_s": float(number), "prompt_tokens": 1100, "output_tokens": 50}
    hashes = {"prefix_hashes": (1, 2, 10 + number), "hash_block_tokens": 512}
    return TraceRequest(number=number, **(values | hashes | changes))


def trace(*requests):
    return Trace(name="t", source="here", licence="none", requests=requests or (request(0), request(1), request(2)))


def test_the_format_is_told_from_the_content(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(AZURE)
    assert read_trace(path).requests[0].prefix_hashes == ()
    path.write_text(MOONCAKE)
    assert read_trace(str(path)).requests[0].prefix_hashes == (3, 4)
    assert (read_trace(path).name, read_trace(path).source, read_trace(path).licence) == (
        "some",
        str(path),
        "not stated",
    )


def test_an_unknown_format_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("\na,b\n1,2\n")
    with pytest.raises(TraceError, match=r"x\.csv, line 2: got 'a,b', expected the header TIMESTAMP.* or a JSON"):
        read_trace(path)


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TraceError, match="is empty; want a CSV or JSONL file"):
        read_trace(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(TraceError, match="No such file or directory"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)
    packed = tmp_path / "x.csv.gz"
    packed.write_bytes(gzip.compress(AZURE.encode()))
    with pytest.raises(TraceError, match="not UTF-8 text; unpack it"):
        read_trace(packed)


def test_a_trace_knows_what_it_shares():
    assert trace().shared_fraction == pytest.approx(4 / 9)
    assert trace(request(0, prefix_hashes=())).shared_fraction == 0.0
    assert trace().duration_s == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": -1.0}, "arrives at -1.0 s"),
        ({"arrival_s": float("nan")}, "arrives at nan s"),
        ({"prompt_tokens": 0}, "0 \\+ 50 tokens"),
        ({"output_tokens": 0}, "1100 \\+ 0 tokens"),
        ({"hash_block_tokens": None}, "hashes of None tokens"),
        ({"hash_block_tokens": 600}, "has 3 hashes, but 1100 tokens make 2 blocks of 600"),
    ],
)
def test_a_request_that_cannot_be_is_refused(changes, message):
    with pytest.raises(TraceError, match=message):
        request(**changes)


def test_a_trace_holds_requests():
    with pytest.raises(TraceError, match="holds no requests"):
        Trace(name="t", source="here", licence="none", requests=())


def test_scaling_by_one_changes_nothing():
    assert scale_trace(trace()) == trace()


def test_time_scales_and_starts_at_zero():
    scaled = scale_trace(trace(), time_scale=0.5, start=1)
    assert [r.arrival_s for r in scaled.requests] == [0.0, 0.5]
    assert [r.number for r in scaled.requests] == [1, 2]
    assert scaled.notes == ("requests 1 to 2", "arrival times times 0.5")
    assert [r.arrival_s for r in scale_trace(trace(), time_scale=0).requests] == [0.0] * 3


def test_lengths_scale_block_by_block():
    scaled = scale_trace(trace(), length_scale=1 / 64).requests[0]
    assert (scaled.prompt_tokens, scaled.output_tokens, scaled.hash_block_tokens) == (2 * 8 + 1, 1, 8)
    assert scaled.prefix_hashes == (1, 2, 10)
    assert scale_trace(trace(), length_scale=2).requests[0].prompt_tokens == 2200


def test_a_rounded_block_decides_the_scale_of_a_hashed_prompt():
    scaled = scale_trace(trace(request(prompt_tokens=1024, prefix_hashes=(1, 2))), length_scale=0.01).requests[0]
    assert (scaled.hash_block_tokens, scaled.prompt_tokens, scaled.output_tokens) == (5, 10, 1)


def test_lengths_without_hashes_scale_alone():
    plain = request(prefix_hashes=(), hash_block_tokens=None)
    assert scale_trace(trace(plain), length_scale=0.1).requests[0].prompt_tokens == 110
    assert scale_trace(trace(plain), length_scale=1e-9).requests[0].prompt_tokens == 1


def test_lengths_are_cut_with_their_hashes():
    cut = scale_trace(trace(), max_prompt_tokens=520, max_output_tokens=10).requests[0]
    assert (cut.prompt_tokens, cut.output_tokens, cut.prefix_hashes) == (520, 10, (1, 2))
    assert scale_trace(trace(), max_prompt_tokens=512).requests[0].prefix_hashes == (1,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"time_scale": -1},
        {"time_scale": float("inf")},
        {"length_scale": 0},
        {"length_scale": float("nan")},
        {"start": -1},
        {"start": 3},
        {"limit": 0},
        {"max_prompt_tokens": 0},
        {"max_output_tokens": -1},
    ],
)
def test_a_scale_that_leaves_nothing_is_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        scale_trace(trace(), **arguments)


@given(
    length_scale=st.floats(1e-4, 3),
    time_scale=st.floats(0, 10),
    start=st.integers(0, 150),
    limit=st.integers(1, 60),
    max_prompt_tokens=st.none() | st.integers(1, 5000),
)
def test_scaled_traces_stay_valid(length_scale, time_scale, start, limit, max_prompt_tokens):
    given_trace = load_excerpt("mooncake-conversation")
    scaled = scale_trace(
        given_trace,
        length_scale=length_scale,
        time_scale=time_scale,
        start=start,
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
    )
    assert len(scaled.requests) == min(limit, 200 - start)
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in pairwise(scaled.requests))
    for before, after in zip(given_trace.requests[start:], scaled.requests, strict=False):
        assert after.prefix_hashes == before.prefix_hashes[: len(after.prefix_hashes)]
        assert max_prompt_tokens or len(after.prefix_hashes) == len(before.prefix_hashes)
