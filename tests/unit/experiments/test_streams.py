import json
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st
from tests.unit.experiments.serving import DONE, chunk, usage

from kvatlas.core.errors import EndpointError
from kvatlas.experiments.streams import Chunk, EventLines, Reply, error_text, token_times

STREAM = b": ping\r\n\r\n" + chunk("é\u2028x") + b"event: x\nid: 7\n" + chunk(" b", reason="stop") + usage(2) + DONE


def bare(at_s: float, *, text: bool = True, closes: bool = False, **counts: int) -> Chunk:
    return Chunk(at_s=at_s, has_text=text, closes=closes, **counts)


@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_packets_may_be_cut_anywhere(cuts):
    lines, places = EventLines(), [0, *sorted(cuts), len(STREAM)]
    packets = [STREAM[a:b] for a, b in pairwise(places)]
    found = [data for packet in packets for data in lines.feed(packet)] + lines.close()
    assert found[-1] == "[DONE]"
    assert [json.loads(data)["choices"] for data in found[:-1]] == [
        [{"text": "é\u2028x"}],
        [{"text": " b", "finish_reason": "stop"}],
        [],
    ]


def test_a_last_line_needs_no_newline():
    lines = EventLines()
    assert lines.feed(b'data: {"a": 1}') == []
    assert lines.close() == ['{"a": 1}']
    assert lines.close() == []


def test_token_ids_say_which_chunk_brought_how_many():
    chunks = [bare(1.0, num_tokens=1), bare(2.0, num_tokens=3), bare(3.0, num_tokens=0, closes=True)]
    assert token_times(chunks, counted=9) == (1.0, 2.0, 2.0, 2.0)


def test_a_count_with_every_event_says_it_too():
    chunks = [bare(1.0, counted=0), bare(2.0, counted=2), bare(3.0, counted=2), bare(4.0, counted=3)]
    assert token_times(chunks, counted=3) == (2.0, 2.0, 4.0)


def test_a_count_with_the_last_event_alone_is_that_of_all():
    reply = Reply()
    reply.add('{"choices": [{"text": "a"}], "usage": null}', 1.0)
    reply.add('{"choices": [{"text": "b", "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}', 2.0)
    assert reply.token_times_s == (1.0, 2.0)


@pytest.mark.parametrize(
    ("chunks", "counted", "times"),
    [
        ([bare(1.0), bare(2.0), bare(3.0)], None, (1.0, 2.0, 3.0)),
        ([bare(1.0), bare(2.0), bare(3.0)], 3, (1.0, 2.0, 3.0)),
        ([bare(1.0), bare(2.0)], 4, (1.0, 1.0, 2.0, 2.0)),
        ([bare(1.0), bare(2.0), bare(3.0)], 2, (1.0, 3.0)),
        ([bare(1.0), bare(2.0)], 1, (1.0,)),
        ([bare(1.0)], 3, (1.0, 1.0, 1.0)),
        ([bare(1.0), bare(2.0, text=False), bare(3.0, text=False, closes=True)], 2, (1.0, 2.0)),
        ([bare(1.0), bare(2.0, text=False), bare(3.0, text=False, closes=True)], 3, (1.0, 2.0, 3.0)),
        ([bare(1.0, text=False), bare(2.0), bare(3.0, text=False, closes=True)], 1, (2.0,)),
        ([bare(1.0), bare(2.0, text=False, closes=True)], None, (1.0,)),
        ([bare(1.0, text=False, closes=True)], 0, ()),
        ([], 3, ()),
    ],
)
def test_without_ids_the_count_decides_which_chunks_hold_tokens(chunks, counted, times):
    assert token_times(chunks, counted) == times


@given(st.integers(1, 30), st.integers(1, 60))
def test_counted_tokens_keep_their_order_and_both_ends(num_chunks, counted):
    times = token_times([bare(float(i)) for i in range(num_chunks)], counted)
    assert len(times) == counted
    assert list(times) == sorted(times)
    assert times[0] == 0.0
    assert counted == 1 or times[-1] == num_chunks - 1


def test_a_reply_is_complete_when_the_server_says_so():
    reply = Reply()
    reply.add('{"choices": [{"text": "a"}]}', 1.0)
    assert not reply.complete
    reply.add('{"choices": [{"text": "b", "finish_reason": "stop"}]}', 2.0)
    assert reply.complete
    reply.add('{"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}}', 2.5)
    assert (reply.token_times_s, reply.cached_tokens) == ((1.0, 2.0), 3)


def test_usage_of_the_wrong_type_is_no_count():
    reply = Reply()
    reply.add('{"choices": null, "usage": {"completion_tokens": "7", "prompt_tokens_details": 1}}', 1.0)
    assert (reply.count("completion_tokens"), reply.cached_tokens, reply.token_times_s) == (None, None, ())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"error": {"message": "out of\\nmemory", "code": 500}}', "the stream reports: out of memory"),
        ('{"object": "error", "message": "no"}', "the stream reports: no"),
        ("oops", "'oops', which is not JSON"),
        ("[1]", "'[1]', which is not a JSON object"),
    ],
)
def test_errors_inside_a_stream_are_named(data, said):
    with pytest.raises(EndpointError, match="stream") as caught:
        Reply().add(data, 1.0)
    assert said in str(caught.value)


def test_error_texts_are_one_short_line():
    assert error_text({"detail": [{"msg": "x"}]}) == '[{"msg": "x"}]'
    assert len(error_text("x" * 1000)) == 200
    assert error_text({"error": {"message": "a\n b"}}) == "a b"
