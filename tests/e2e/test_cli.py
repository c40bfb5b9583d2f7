"""The commands from end to end, on models that need no download."""

import json

import pytest
from tests.unit.cli.running import kvatlas

from kvatlas.core.errors import CapacityError
from kvatlas.experiments.prompt_length import PromptLength
from kvatlas.experiments.sweep import EXPERIMENTS
from kvatlas.records.store import RecordStore
from kvatlas.strategies.strategy import Strategy

H2O = "h2o(heavy=0.25, recent=0.25)"
SPEED = [
    *("--speed-model", "random:llama-mini", "--repeats", 1, "--kv-memory", "16MiB", "--threads", 1),
    *("--prompt-tokens", "32,64", "--strategy", "full", "--strategy", H2O),
]
TINY = [
    *SPEED,
    *("--host-memory", "16MiB", "--strategy", "infinigen"),
    *("--breakdown-model", "random:llama-mini", "--breakdown-prompt-tokens", 64, "--breakdown-output-tokens", 3),
    *("--breakdown-link", "none", "--concurrency", "2", "--concurrency-prompt-tokens", 32),
    *("--concurrency-output-tokens", 3, "--output-tokens", 3, "--output-prompt-tokens", 32),
    *("--accuracy-task", "2 keys", "--accuracy-context-tokens", 128, "--accuracy-budgets", "0.5"),
    *("--context-tokens", 256, "--budgets", "0.5", "--turns", "1,2", "--num-prompts", 2),
    *("--arrivals", "poisson", "--rates", 500, "--rate-requests", 2, "--rate-prompt-tokens", 32),
    *("--rate-output-tokens", 3, "--model", "random:llama-long", "--model-prompt-tokens", 32),
    *("--model-output-tokens", 3, "--model-batch", 2),
    *("--trace", "azure-conv", "--trace-requests", 2, "--trace-time-scale", 0, "--trace-length-scale", 0.02),
]
POINTS = 6 + 2 + 3 * 3 + 3 + 3 + 2 * 3 + 3 + 3 + 3


def contents(path):
    with RecordStore(path, mode="read") as store:
        return store.points(), store.rows(), store.runs()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A records file that holds one whole sweep, what that printed, and the command line."""
    path = tmp_path_factory.mktemp("sweep") / "records.duckdb"
    command = ["characterize", *TINY, "--records", path]
    return path, kvatlas(*command), command


def test_characterize_measures_every_experiment(finished):
    path, result, _ = finished
    assert result.status == 0, result
    assert f"{POINTS} measured, 0 found done, 0 refused, 0 failed" in result.out
    assert f"next: kvatlas report --records {path}" in result.out
    points, rows, (run,) = contents(path)
    assert {point.status for point in points} == {"done"}
    assert {row.experiment for row in rows} == set(EXPERIMENTS)
    speed = {row.strategy for row in rows if row.model_role == "speed"}
    assert speed == {str(Strategy.parse(one)) for one in ("full", H2O, "infinigen")}
    assert set(run.models) == {"random:llama-mini", "random:llama-long", "bundled"}
    assert run.command.startswith("kvatlas characterize --speed-model random:llama-mini")


def test_the_same_command_again_measures_nothing(finished):
    path, _, command = finished
    before = contents(path)
    result = kvatlas(*command)
    assert f"0 measured, {POINTS} found done" in result.out
    after = contents(path)
    assert after[:2] == before[:2]
    assert len(after[2]) == len(before[2]) + 1


def test_report_prints_the_winners_and_writes_the_page(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = kvatlas("report", "--records", finished[0], "--out", tmp_path / "page")
    assert (result.status, result.err) == (0, "")
    for text in ("prompt_length on random:llama-mini", "TTFT", "Goodput", "h2o"):
        assert text in result.out
    assert f"page: {tmp_path / 'page' / 'index.html'}" in result.out
    assert (tmp_path / "page" / "index.html").stat().st_size > 1000


def test_an_interrupt_keeps_finished_points_and_the_next_run_goes_on(tmp_path, monkeypatch):
    path, measure, calls = tmp_path / "r.duckdb", PromptLength.measure, []

    def interrupted(self, point, lab):
        calls.append(point)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, point, lab)

    monkeypatch.setattr(PromptLength, "measure", interrupted)
    command = ["characterize", "prompt_length", *SPEED, "--records", path]
    result = kvatlas(*command)
    assert result.status == 130
    assert f"interrupted: {path} keeps 2 finished points; the same command continues from there" in result.err
    assert len(contents(path)[0]) == 2
    assert "2 measured, 2 found done" in kvatlas(*command).out
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("error", "status", "counts"),
    [
        (RuntimeError("it broke"), 1, "2 measured, 0 found done, 0 refused, 2 failed"),
        (CapacityError("it is too long"), 0, "2 measured, 0 found done, 2 refused, 0 failed"),
    ],
)
def test_failed_points_fail_the_command_and_refused_ones_do_not(error, status, counts, tmp_path, monkeypatch):
    measure = PromptLength.measure

    def broken(self, point, lab):
        if point.params["prompt_tokens"] == 64:
            raise error
        return measure(self, point, lab)

    monkeypatch.setattr(PromptLength, "measure", broken)
    path = tmp_path / "r.duckdb"
    result = kvatlas("characterize", "prompt_length", *SPEED, "--records", path)
    assert result.status == status
    assert counts in result.out
    assert str(error) in result.err
    assert ("error: 2 points failed" in result.err) == (status == 1)
    assert sum(point.status != "done" for point in contents(path)[0]) == 2


def test_a_time_limit_leaves_out_and_the_same_command_goes_on(tmp_path):
    path = tmp_path / "r.duckdb"
    command = ["characterize", "prompt_length", *SPEED, "--records", path]
    result = kvatlas(*command, "--time-limit", 1e-9)
    assert result.status == 0
    assert "1 measured" in result.out
    assert "left out at their time limit: prompt_length 3; the same command goes on there" in result.out
    assert "left out prompt_length: 3 of 4 points" in result.err
    result = kvatlas(*command, "--no-time-limit")
    assert "3 measured, 1 found done" in result.out
    assert "left out" not in result.out


def test_list_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = kvatlas("characterize", "--list", "--prompt-tokens", "7,8")
    assert result.status == 0
    assert "prompt_length: How do" in result.out
    assert "prompt_tokens = (7, 8)" in result.out
    assert list(tmp_path.iterdir()) == []


def test_generate_streams_one_prompt():
    arguments = ["generate", "def add(", "--max-tokens", 8]
    streamed, whole = kvatlas(*arguments), kvatlas(*arguments, "--no-stream")
    assert streamed.status == 0
    assert streamed.out == whole.out
    (line,) = streamed.err.splitlines()
    for text in ("full: ", "+ 8 tokens", "TTFT", "TPOT", "cache", "full would hold"):
        assert text in line


def test_generate_answers_each_prompt_in_json(tmp_path):
    (tmp_path / "prompt.txt").write_text("one two three " * 40)
    result = kvatlas("generate", "a", "--prompt-file", tmp_path / "prompt.txt", "--strategy", H2O, "--json")
    assert (result.status, result.err) == (0, "")
    short, long = map(json.loads, result.out.splitlines())
    assert (short["prompt"], long["prompt"]) == ("a", "one two three " * 40)
    assert short["output_tokens"] == len(short["token_ids"]) == 64
    assert long["strategy"] == str(Strategy.parse(H2O))
    assert 0 < long["cache_bytes"] < long["cache_bytes_under_full"]
    assert long["cache_bytes"] <= long["cache_peak_bytes"]


def test_generate_is_repeatable_with_a_seed_and_stops_where_told():
    arguments = ["generate", "def add(", "--temperature", 1, "--seed", 3, "--max-tokens", 12]
    text = kvatlas(*arguments).out
    assert kvatlas(*arguments).out == text
    stop = text[3:5]
    assert kvatlas(*arguments, "--stop", stop).out == text[: text.index(stop)] + "\n"
