import signal
import time
from dataclasses import replace

import pytest
from tests.unit.cli.running import kvatlas, once
from tests.unit.experiments.serving import DONE, after_probe, chunk, serving, usage, well

from kvatlas.experiments import peer, trace_replay
from kvatlas.experiments.experiment import Lab
from kvatlas.experiments.load import Observation
from kvatlas.experiments.sweep import PRESETS, conditioned
from kvatlas.experiments.trace_replay import TraceReplay
from kvatlas.records.store import RecordStore

TRACE = [
    *("--trace", "mooncake-conversation", "--requests", 3, "--time-scale", 0, "--length-scale", 0.01),
    *("--max-prompt-tokens", 40),
]
DRAWN = ["--arrivals", "poisson", "--rate", 200, "--requests", 3, "--prompt-tokens", 5, "--output-tokens", 4]
SETTINGS = replace(
    PRESETS["quick"],
    strategies=("full",),
    traces=("mooncake-conversation",),
    trace_requests=3,
    trace_time_scale=0.0,
    trace_length_scale=0.01,
    trace_max_prompt_tokens=40,
)


@pytest.fixture
def records(tmp_path):
    return tmp_path / "r.duckdb"


def contents(path):
    with RecordStore(path, mode="read") as store:
        return store.points(), store.rows(), store.runs()


def test_a_peer_gets_the_requests_and_the_params_of_our_strategies(records, monkeypatch):
    with serving() as server:
        result = kvatlas("drive", server.url, "--name", "vllm 1", *TRACE, "--records", records, "--model-name", "ours")
        assert result.status == 0, result
        sent = sorted(body["prompt"] for body in server.bodies[1:])
    (peer,), rows, (run,) = contents(records)
    assert peer.point.strategy == "peer: vllm 1"
    ours = conditioned(next(TraceReplay().points(SETTINGS, "ours")), SETTINGS)
    assert peer.point.model_copy(update={"strategy": "full"}) == ours
    assert {row.metric for row in rows} >= {"ttft", "tpot", "e2e", "goodput", "output_throughput", "failed_requests"}
    assert run.models["ours"]["served_by"] == "vllm 1"

    driven = []

    def caught(engine, arrivals, strategy):
        driven.extend(arrivals)
        return Observation(wall_s=1.0)

    monkeypatch.setattr(trace_replay, "drive", caught)
    monkeypatch.setattr(Lab, "engine", lambda *arguments, **named: StandIn)
    TraceReplay().measure(ours, Lab(SETTINGS))
    assert sorted(arrival.prompt_ids for arrival in driven) == sent


class StandIn:
    """An engine of which only the vocabulary is asked: the fake server's 100 token ids."""

    class store:  # noqa: N801
        class lanes:  # noqa: N801
            class shape:  # noqa: N801
                vocab_size = 100


def test_the_table_says_what_users_waited(records):
    with serving() as server:
        result = kvatlas("drive", f"{server.url}/v1", "--name", "vllm 1", *DRAWN, "--records", records)
    assert result.status == 0, result
    for text in (
        *("Serving Benchmark Result", "Successful requests", "3 of 3", "TTFT <= 1000 ms, TPOT <= 100 ms"),
        *("mean", "median", "p90", "p99", "TTFT (ms)", "TPOT (ms)", "E2E (ms)", "next: kvatlas report --records"),
    ):
        assert text in result.out
    (point,), _, _ = contents(records)
    assert point.point.experiment == "request_rate"
    assert point.point.model == "tiny"
    assert point.point.params["arrivals"] == "poisson"
    assert point.point.params["rate"] == 200


def test_another_seed_is_a_repeat_and_the_same_one_is_refused(records):
    with serving() as server:
        command = ["drive", server.url, "--name", "x", *DRAWN, "--records", records]
        assert kvatlas(*command).status == 0
        asked = len(server.bodies)
        assert "another --seed adds a repeat" in kvatlas(*command).error
        assert len(server.bodies) == asked
        assert kvatlas(*command, "--seed", 1).status == 0
    points, _, _ = contents(records)
    assert [point.seed for point in points] == [0, 1]
    assert len({point.point.key for point in points}) == 1


def test_failed_requests_fail_the_command_and_keep_the_rest(records):
    answered = []

    def script(body):
        answered.append(body)
        return (500, b"no") if len(answered) == 2 else well(body)

    with serving(after_probe(script)) as server:
        result = kvatlas("drive", server.url, "--name", "x", *DRAWN, "--records", records)
    assert result.status == 1
    assert "note: 1 requests failed, the first with: HTTP 500, no" in result.out
    assert "error: 1 requests failed" in result.err
    assert sum(row.metric == "ttft" for row in contents(records)[1]) == 2


def test_what_the_server_refuses_is_told(records):
    def script(body):
        return (400, {"error": "ignore_eos"}) if "ignore_eos" in body else well(body)

    with serving(script) as server:
        result = kvatlas("drive", server.url, "--name", "x", *DRAWN, "--records", records)
    assert "note: the server refuses ignore_eos; the run went on without" in result.out


def test_an_interrupt_writes_no_half_point(records, monkeypatch):
    monkeypatch.setattr(peer, "_stream", interrupting(peer._stream))
    with serving() as server:
        result = kvatlas("drive", server.url, "--name", "x", *DRAWN, "--records", records)
    assert result.status == 130
    assert f"interrupted: {records} keeps what it had; a point needs all 3 requests" in result.err
    assert not records.exists()


def interrupting(stream):
    async def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        await stream(*arguments)

    return interrupted


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["either --trace NAME or --arrivals poisson"]),
        ([*TRACE, *DRAWN], ["either --trace NAME or --arrivals poisson"]),
        ([*DRAWN, "--rate", 0], ["rate=0.0", "above 0"]),
        ([*DRAWN, "--rate", "inf"], ["rate=inf", "finite"]),
        ([*DRAWN, "--prompt-tokens", 0], ["rate_prompt_tokens=0", "at least 1"]),
        ([*DRAWN, "--burstiness", -1], ["'gamma -1'", "write poisson"]),
        ([*DRAWN, "--arrivals", "weekly"], ["'weekly'", "write poisson"]),
        ([*TRACE, "--burstiness", 2], ["--burstiness would do nothing", "--arrivals"]),
        ([*DRAWN, "--vocabulary", 0], ["vocabulary=0", "at least 1"]),
        ([*DRAWN, "--timeout", 0], ["timeout_s=0", "above 0"]),
        ([*DRAWN, "--requests", 0], ["_requests=0", "at least 1"]),
        ([*DRAWN, "--name", " "], ["name of the server is empty"]),
        ([*DRAWN, "--prompt-tokens", 5000], ["5004 tokens", "takes 4096"]),
        (["--trace", "gone.csv"], ["gone.csv", "check the path"]),
    ],
)
def test_requests_that_cannot_be_meant(arguments, parts, records):
    with serving() as server:
        error = kvatlas("drive", *once(server.url, "--name", "x", *arguments, "--records", records)).error
    assert all(part in error for part in parts), error
    assert server.bodies == []
    assert not records.exists()


def test_a_server_that_does_not_tell_its_vocabulary(records):
    with serving(models={"data": [{"id": "m"}]}) as server:
        command = ["drive", server.url, "--name", "x", *DRAWN, "--records", records]
        assert "write --vocabulary N" in kvatlas(*command).error
        assert kvatlas(*command, "--vocabulary", 50).status == 0
    assert max(max(body["prompt"]) for body in server.bodies) < 50


@pytest.mark.parametrize("key", [("--api-key", "secret"), ("--api-key=secret",)])
def test_the_records_do_not_keep_the_key(records, key):
    with serving() as server:
        assert kvatlas("drive", server.url, "--name", "x", *DRAWN, *key, "--records", records).status == 0
        assert server.headers[-1]["Authorization"] == "Bearer secret"
    (run,) = contents(records)[2]
    assert "--api-key" in run.command
    assert "secret" not in run.command


def test_the_records_do_not_keep_a_password(records):
    with serving() as server:
        url = server.url.replace("http://", "http://me:secret@")
        assert kvatlas("drive", url, "--name", "x", *DRAWN, "--records", records).status == 0
    (run,) = contents(records)[2]
    assert f"drive {server.url} " in run.command
    assert "secret" not in run.model_dump_json()


def test_the_key_may_come_from_the_environment(records, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hidden")
    with serving() as server:
        kvatlas("drive", server.url, "--name", "x", *DRAWN, "--records", records)
        assert server.headers[-1]["Authorization"] == "Bearer hidden"


@pytest.mark.parametrize("counts", [True, False])
def test_what_opens_a_stream_is_no_token(records, counts):
    """The server waits between an empty first chunk and the first token; the wait is the user's."""

    def script(body):
        yield chunk("")
        time.sleep(0.25)
        yield from (chunk() for _ in range(body["max_tokens"]))
        yield chunk("", reason="length")
        yield from [usage(body["max_tokens"])] if counts else []
        yield DONE

    with serving(after_probe(script)) as server:
        result = kvatlas("drive", server.url, "--name", "slow", *DRAWN, "--records", records)
    assert result.status == 0, result
    assert ("does not count tokens" in result.out) is not counts
    _, rows, _ = contents(records)
    assert min(row.value for row in rows if row.metric == "ttft") >= 0.25
    told = next(line for line in result.out.splitlines() if line.startswith("Total output tokens"))
    assert told.split()[-1] == "12"
