import signal
import socket

import pytest
from tests.unit.experiments.serving import DONE, after_probe, chunk, event, serving, usage, well

from kvatlas.core.errors import CapacityError, ConfigError, EndpointError
from kvatlas.experiments.endpoint import EXTENSIONS, Endpoint, ServedModel, describe_endpoint
from kvatlas.experiments.load import Arrival
from kvatlas.experiments.peer import check_lengths, drive_endpoint, served_samples
from kvatlas.metrics.latency import Slo

ARRIVALS = [Arrival(at_s=0.01 * i, prompt_ids=[i, 7, 8, 9, 10], output_tokens=4 + i) for i in range(3)]
STOP = chunk(" z", reason="stop")


def run(server, arrivals=ARRIVALS, **fields):
    return drive_endpoint(Endpoint(url=server.url, **fields), "tiny", arrivals)


def failure(script, **how):
    """Return why the last of three requests failed where the others went well."""
    with serving(after_probe(lambda body: script if body["max_tokens"] == 6 else well(body)), **how) as server:
        served = run(server, timeout_s=1.0 if b"" in script else 30.0)
    assert [answer.number for answer in served.answers] == [0, 1]
    (reason,) = served.failures
    return reason


def test_requests_go_out_as_planned_and_every_token_is_timed():
    with serving() as server:
        served = run(server)
    assert [body["prompt"] for body in server.bodies] == [ARRIVALS[0].prompt_ids, *(a.prompt_ids for a in ARRIVALS)]
    assert all(body["stream"] and body["temperature"] == 0 and body["ignore_eos"] for body in server.bodies)
    assert server.bodies[-1]["min_tokens"] == server.bodies[-1]["max_tokens"] == 6
    assert server.bodies[-1]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert [one.output_tokens for one in served.times] == [4, 5, 6]
    assert [one.prompt_tokens for one in served.times] == [5, 5, 5]
    planned = [answer.times.arrival_s - answer.late_s for answer in served.answers]
    assert [later - planned[0] for later in planned] == pytest.approx([0, 0.01, 0.02])
    assert served.late_s == max(answer.late_s for answer in served.answers)
    assert (served.failures, served.unfinished, served.short) == ([], 0, 0)
    assert served.wall_s >= max(one.token_times_s[-1] for one in served.times) - served.times[0].arrival_s
    assert served.dialect.extensions == EXTENSIONS


def test_arrivals_are_sorted_first():
    with serving() as server:
        assert [one.output_tokens for one in run(server, ARRIVALS[::-1]).times] == [4, 5, 6]


def test_several_tokens_in_one_chunk_have_one_time():
    two = chunk(" ab", ids=[1, 2])
    with serving(after_probe(lambda body: [two, chunk(" c", ids=[3]), chunk("", ids=[4], reason="length"), DONE])) as s:
        (times, *_) = run(s).times
    assert times.output_tokens == 4
    assert times.token_times_s[0] == times.token_times_s[1]


@pytest.mark.parametrize("chunked", [True, False])
def test_packets_may_hold_half_an_event_or_many(chunked):
    def script(body):
        stream = b"".join(well(body))
        return [stream[i : i + 7] for i in range(0, len(stream), 7)] if body["max_tokens"] == 4 else [stream]

    with serving(script, chunked=chunked) as server:
        assert [one.output_tokens for one in run(server).times] == [4, 5, 6]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([chunk(), event({"error": {"message": "cache is full"}})], "the stream reports: cache is full"),
        ([chunk(), event(b"<html>")], "'<html>', which is not JSON"),
        ([chunk(), chunk(), b"!"], "(2 of 6 tokens had come)"),
        ([chunk(), b""], "no end after 1 s (1 of 6 tokens had come)"),
        ([DONE], "the answer holds no token"),
        ([usage(0), DONE], "the answer holds no token"),
        ([b'{"choices": []}'], "no event came (text/event-stream); does the server stream?"),
        ((503, {"error": {"message": "too many"}}), "HTTP 503, too many"),
        ((500, b"<h1>oops</h1>"), "HTTP 500, <h1>oops</h1>"),
    ],
)
def test_a_failed_request_is_counted_with_its_reason(script, said):
    assert said in failure(script)


def test_a_server_that_hangs_up_without_chunks_ended_early():
    assert failure([chunk(), b"!"], chunked=False) == "the stream ended early (1 of 6 tokens had come)"


def test_a_reason_is_enough_of_an_end():
    with serving(lambda body: [chunk()] * (body["max_tokens"] - 1) + [STOP]) as server:
        assert [one.output_tokens for one in run(server).times] == [4, 5, 6]


def test_short_answers_are_counted():
    with serving(lambda body: [chunk(), STOP, DONE]) as server:
        assert run(server).short == 3


def test_failures_earn_no_goodput_and_are_recorded():
    script = after_probe(lambda body: (500, b"no") if body["max_tokens"] == 6 else well(body))
    with serving(script) as server:
        served = run(server)
    samples = {(one.metric, one.index): one.value for one in served_samples(served, Slo(ttft_s=60.0))}
    assert samples["failed_requests", 0] == 1
    assert samples["goodput", 0] == pytest.approx(2 / served.wall_s)
    assert {metric for metric, _ in samples} == {
        *("ttft", "tpot", "e2e", "sent_late", "goodput", "request_throughput", "output_throughput", "failed_requests")
    }


def test_hits_of_the_prefix_cache_are_recorded_where_told():
    def script(body):
        return [*well(body)[:-2], usage(body["max_tokens"], prompt_tokens_details={"cached_tokens": 4}), DONE]

    with serving(script) as server:
        samples = served_samples(run(server), Slo(ttft_s=1.0))
    assert [one.value for one in samples if one.metric == "cached_prompt_tokens"] == [12]


def test_if_all_fail_it_is_an_error_that_names_url_and_next_step():
    with serving(after_probe(lambda body: (500, b"no"))) as server, pytest.raises(EndpointError) as caught:
        run(server)
    assert str(caught.value) == (
        f"all 3 requests to {server.url} failed, the first with: HTTP 500, no; see the server's log"
    )


def refusing(*names, words="unknown field {}"):
    def script(body):
        bad = [name for name in names if name in body]
        return (400, {"error": {"message": words.format(bad[0])}}) if bad else well(body)

    return script


def test_a_refused_extension_is_dropped_before_anything_is_measured():
    with serving(refusing("ignore_eos", "min_tokens")) as server:
        served = run(server)
    assert served.dialect.extensions == ("continuous_usage_stats", "stream_options")
    assert served.failures == []
    assert all("ignore_eos" not in body for body in server.bodies[-3:])


def test_a_server_that_does_not_say_what_it_refuses_is_asked_again_with_less():
    with serving(refusing("min_tokens", words="bad request")) as server:
        assert run(server).dialect.extensions == ("ignore_eos", "stream_options")


def test_only_the_part_of_an_option_that_is_refused_is_dropped():
    def script(body):
        options = body.get("stream_options", {})
        refused = "continuous_usage_stats" in options
        return (400, {"error": "stream_options.continuous_usage_stats is unknown"}) if refused else well(body)

    with serving(script) as server:
        assert run(server).dialect.extensions == EXTENSIONS[1:]
    assert server.bodies[-1]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("words", ["prompt must be a string", "no"])
def test_prompts_go_as_text_where_token_ids_are_refused(words):
    def script(body):
        return well(body) if isinstance(body["prompt"], str) else (422, {"detail": words})

    with serving(script) as server:
        served = run(server)
    assert served.dialect.text
    assert served.dialect.extensions == EXTENSIONS
    assert max(str(body["prompt"]) for body in server.bodies[-2:]) == " c h i j k"
    assert [one.prompt_tokens for one in served.times] == [5, 5, 5]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, {"error": "never"}), "HTTP 400, never; see the server's log"),
        ((401, {"error": "key"}), "HTTP 401, key; give --api-key or set OPENAI_API_KEY"),
        ((404, {"error": {"message": "no model 'tiny'"}}), "HTTP 404, no model 'tiny'; see the server's log"),
        ((503, {"error": {"message": "loading model"}}), "HTTP 503, loading model; see the server's log"),
    ],
)
def test_a_server_that_refuses_even_the_probe(answer, said):
    with serving(lambda body: answer) as server, pytest.raises(EndpointError) as caught:
        run(server)
    assert str(caught.value) == f"{server.url} refuses: {said}"


def closed_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_nobody_at_the_url():
    url = f"http://127.0.0.1:{closed_port()}/v1"
    for call in (describe_endpoint, lambda endpoint: drive_endpoint(endpoint, "tiny", ARRIVALS)):
        with pytest.raises(EndpointError, match="cannot be reached") as caught:
            call(Endpoint(url=url))
        assert url.removesuffix("/v1") in str(caught.value)
        assert "start the server" in str(caught.value)


def test_a_server_that_never_answers():
    with serving(lambda body: [b""]) as server, pytest.raises(EndpointError, match="no answer within"):
        run(server, timeout_s=0.2)


@pytest.mark.parametrize(
    ("models", "wanted", "found"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, None, ServedModel(name="a")),
        ({"data": [{"id": "a"}, {"id": "b", "max_model_len": 9}]}, "b", ServedModel(name="b", max_tokens=9)),
        ({"data": [{"id": "a", "meta": {"n_vocab": 32}}]}, None, ServedModel(name="a", vocabulary=32)),
        ({"data": [{"id": "a", "meta": None, "max_model_len": "x"}]}, None, ServedModel(name="a")),
        (None, "a", ServedModel(name="a")),
        ({"data": [{"id": "a", "max_model_len": 9}]}, "loaded later", ServedModel(name="loaded later")),
    ],
)
def test_what_a_server_says_of_its_model(models, wanted, found):
    with serving(models=models) as server:
        assert describe_endpoint(Endpoint(url=f"{server.url}/v1/completions", model=wanted)) == found


@pytest.mark.parametrize(
    ("models", "wanted", "said"),
    [
        ({"data": []}, None, "lists no model; load one, or name it: --served-model-name"),
        ({"data": None}, None, "lists no model"),
        (None, None, "refuses: HTTP 404"),
        (b"<html>", None, "answers no JSON; is it an OpenAI-compatible server?"),
        ([1], None, "answers no JSON"),
    ],
)
def test_models_that_cannot_be_used(models, wanted, said):
    with serving(models=models) as server, pytest.raises(EndpointError) as caught:
        describe_endpoint(Endpoint(url=server.url, model=wanted))
    assert said in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", ""])
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError, match="write it like http://localhost:8000"):
        Endpoint(url=url)


def test_a_key_and_a_password_are_sent_and_never_shown():
    with serving() as server:
        run(server, api_key="secret")
        assert server.headers[-1]["Authorization"] == "Bearer secret"
        open_url = server.url.replace("//", "//me:word@")
        endpoint = Endpoint(url=f"{open_url}/v1/")
        drive_endpoint(endpoint, "tiny", ARRIVALS[:1])
    assert server.headers[-1]["Authorization"].startswith("Basic ")
    assert endpoint.base == server.url
    assert "secret" not in repr(Endpoint(url=server.url, api_key="secret"))


def test_an_interrupt_keeps_what_is_whole():
    late = [*ARRIVALS[:2], Arrival(at_s=60.0, prompt_ids=[1], output_tokens=1)]
    finished = []

    def interrupt():
        finished.append(1)
        if len(finished) == 2:
            signal.raise_signal(signal.SIGINT)

    with serving() as server:
        served = drive_endpoint(Endpoint(url=server.url), "tiny", late, interrupt)
    assert [answer.number for answer in served.answers] == [0, 1]
    assert (served.unfinished, served.failures) == (1, [])


def test_requests_longer_than_the_server_takes_are_found_before_they_are_sent():
    check_lengths(ARRIVALS, ServedModel(name="a"))
    check_lengths(ARRIVALS, ServedModel(name="a", max_tokens=11))
    with pytest.raises(CapacityError, match="11 tokens, but the server takes 10"):
        check_lengths(ARRIVALS, ServedModel(name="a", max_tokens=10))
