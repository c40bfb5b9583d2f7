import json
from itertools import pairwise

import pytest
from hypothesis import assume, given, strategies as st
from tests.unit.experiments.serving import DONE, chunk, usage

from kvatlas.core.errors import EndpointError
from kvatlas.experiments.streams import Chunk, EventLines, Reply, error_text, token_times

STREAM = b": ping\r\n\r\n" + chunk("é\u2028x") + b"event: x\nid: 7\n" + chunk(" b", reason="stop") + usage(2) + DONE


def bare(at_s: float, *, text: bool = True, closes: bool = False, **counts: int) -> Chunk:
    return Chunk(at_s=at_s, text_chars=int(text), closes=closes, **counts)


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
        ([bare(1.0), bare(2.0, text=False), bare(3.0)], None, (1.0, 2.0, 3.0)),
        ([bare(0.0, text=False), bare(1.0), bare(2.0)], None, (1.0, 2.0)),
        ([bare(0.0, text=False), bare(1.0), bare(2.0)], 4, (1.0, 1.0, 2.0, 2.0)),
        ([bare(0.0, text=False), bare(1.0), bare(2.0)], 3, (0.0, 1.0, 2.0)),
        ([bare(0.0, text=False), bare(1.0), bare(2.0, text=False, closes=True)], 2, (1.0, 2.0)),
        ([bare(1.0, text=False), bare(2.0, text=False), bare(3.0, text=False, closes=True)], 2, (1.0, 2.0)),
        ([bare(1.0, text=False), bare(2.0, text=False), bare(3.0, text=False, closes=True)], None, ()),
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


@st.composite
def streams(draw):
    """Return events with their times, when each token was there, and whether the server lets every token be placed.

    The first token has text; where nothing counts them, each has a chunk of its own.
    """
    told = draw(st.sampled_from(["nothing", "last", "each", "ids"]))
    most = 1 if told == "nothing" else 4
    sizes = draw(st.lists(st.integers(1, most), min_size=1, max_size=8))
    name = draw(st.sampled_from(["text", "reasoning", "reasoning_content"]))
    opened, closed = draw(st.booleans()), draw(st.booleans())
    exact = told in ("each", "ids") or set(sizes) == {1}
    assume(exact or sum(sizes) > len(sizes) + 2)  # else the count fits another reading of the empty chunks
    events, tokens = [], []
    if opened:
        events.append((0.0, {"choices": [{"text": ""}], "usage": {"completion_tokens": 0} if told == "each" else None}))
    for place, size in enumerate(sizes, start=1):
        text = "ab" * size if place == 1 else "".join(draw(st.lists(st.sampled_from(["", "ab"]), min_size=size)))
        choice = {"text": "", name: text} | ({"token_ids": [7] * size} if told == "ids" else {})
        tokens += [float(place)] * size
        events.append((float(place), {"choices": [choice]}))
        if told == "each":
            events[-1][1]["usage"] = {"completion_tokens": len(tokens)}
    if closed:
        events.append((tokens[-1] + 0.5, {"choices": [{"text": "", "finish_reason": "length"}]}))
    if told != "nothing":
        events.append((tokens[-1] + 0.7, {"choices": [], "usage": {"completion_tokens": len(tokens)}}))
    return events, tuple(tokens), exact


@given(streams())
def test_tokens_are_there_when_the_server_sent_them(stream):
    events, tokens, exact = stream
    reply = Reply()
    for at_s, event in events:
        reply.add(json.dumps(event), at_s)
    found = reply.token_times_s
    assert (len(found), found[0], found[-1]) == (len(tokens), tokens[0], tokens[-1])
    assert found == tokens or not exact


def test_a_server_that_counts_nothing_is_found_out():
    reply = Reply()
    reply.add('{"choices": [{"text": "a"}]}', 1.0)
    assert not reply.counted
    reply.add('{"choices": [], "usage": {"completion_tokens": 1}}', 1.0)
    assert reply.counted


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
