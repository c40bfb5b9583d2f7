"""What users get wrong: each is one line that names the value and the next step, and leaves nothing behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from tests.unit.cli.running import kvatlas, once
from transformers import AutoConfig, AutoModelForCausalLM

from kvatlas.models.loading import BUNDLED_DIR
from kvatlas.records.store import RecordStore

SWEEP = ["characterize", "prompt_length", "--speed-model", "random:llama-mini", "--prompt-tokens", 32, "--repeats", 1]


@pytest.fixture(autouse=True)
def untouched(tmp_path, monkeypatch):
    """Run in an empty folder that looks the same afterwards as the test made it."""
    monkeypatch.chdir(tmp_path)


def refused(*arguments):
    """Return the error line of a command that must leave the working folder as it is."""

    def snapshot():
        return {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*") if path.is_file()}

    before = snapshot()
    result = kvatlas(*arguments)
    assert result.out == ""
    assert snapshot() == before
    return result.error


@pytest.mark.parametrize("command", ["generate", "characterize"])
@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("h3o", ["unknown strategy 'h3o'", "did you mean 'h2o'"]),
        ("h2o(hevy=0.1)", ["'hevy'", "did you mean 'heavy'"]),
        ("h2o(heavy=1.5)", ["heavy=1.5", "(0, 1]"]),
        ("h2o(heavy=host)", ["heavy wants int or float", "host"]),
        ("h2o | streaming_llm", ["'h2o' and 'streaming_llm'", "leave one out"]),
        ("h2o(heavy=0.1", ["cannot read", "write name(param=value, ...)"]),
        ("", ["strategy is empty", "write"]),
    ],
)
def test_strategies_that_do_not_exist(command, strategy, parts):
    arguments = ["hi"] if command == "generate" else []
    line = refused(command, *arguments, "--strategy", strategy)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["generate"], ["no prompt", "--prompt-file"]),
        (["generate", ""], ["empty", "at least one"]),
        (["generate", "--prompt-file", "gone.txt"], ["'gone.txt'", "No such file", "check the path"]),
        (["generate", "hi", "--max-tokens", 0], ["max_tokens", "from 1 to", "got 0"]),
        (["generate", "hi", "--json", "--temperature", -1], ["temperature", "from 0 to", "got -1.0"]),
        (["generate", "hi", "--top-p", 1.5], ["top_p", "above 0 and at most 1", "got 1.5"]),
        (["generate", "hi", "--seed", 3], ["--seed", "temperature is 0", "--temperature"]),
        (["generate", "hi", "--top-k", 5, "--top-p", 0.9], ["--top-k and --top-p", "greedy", "--temperature"]),
        (["generate", "hi", "--kv-memory", "100TiB"], ["100 TiB", "lower --kv-memory"]),
        (["generate", "hi", "--kv-memory", "much"], ["'much'", "write it like 512MiB"]),
        (["generate", "one two three " * 3000], ["prompt of", "shorten the prompt"]),
        (["generate", "one two " * 300, "--kv-memory", "256KiB"], ["prompt of", "KiB; raise --kv-memory"]),
        (["generate", "hi", "--model", "no/such/folder"], ["'no/such/folder'", "does not exist"]),
        (["generate", "hi", "--model", "random:llama-9t"], ["'random:llama-9t'", "llama-mini"]),
        (["generate", "hi", "--model", "random:llama-mini"], ["no tokenizer", "choose"]),
        (["generate", "hi", "--dtype", "int3"], ["unknown dtype 'int3'", "float32"]),
        (["generate", "hi", "--device", "tpu"], ["unknown device 'tpu'", "cuda"]),
        (["characterize", "prompt_lenght"], ["unknown experiment 'prompt_lenght'", "did you mean 'prompt_length'"]),
        (["characterize", "--preset", "quik"], ["unknown preset 'quik'", "did you mean 'quick'"]),
        (["characterize", "--kv-memory", "100TiB"], ["100 TiB", "lower --kv-memory"]),
        (["characterize", "--host-memory", "900TiB"], ["900 TiB", "lower --host-memory"]),
        (["characterize", "--repeats", 0], ["repeats=0", "at least 1"]),
        (["characterize", "--prompt-tokens", "32,-1"], ["prompt_tokens=(32, -1)", "at least 1"]),
        (["characterize", "--budgets", 20], ["budgets=(20.0,)", "(0, 1]"]),
        (["characterize", "--threads", 0], ["threads=0", "at least 1"]),
        (["characterize", "--slo-ttft", "nan"], ["slo_ttft_s=nan", "above 0"]),
        (["characterize", "--trace", "gone.csv"], ["gone.csv", "No such file", "check the path"]),
        (["characterize", "--time-limit", "soon"], ["'soon'", "early_fact=600"]),
        (["characterize", "--time-limit", "early_fct=5"], ["unknown experiment 'early_fct'", "'early_fact'"]),
        (["characterize", "--link", "fast"], ["'fast'", "16GB/s,10us"]),
        (["characterize", "--arrivals", "posson"], ["'posson'", "poisson"]),
        (["characterize", "--accuracy-task", "hay"], ["unknown task 'hay'", "single needle"]),
        (["characterize", "--model", "random:llama-9t"], ["'random:llama-9t'", "llama-mini"]),
        (["characterize", "--config", "gone.toml"], ["'gone.toml'", "No such file", "check the path"]),
        (once(*SWEEP, "--speed-model", "random:llama-9t"), ["'random:llama-9t'", "llama-mini"]),
        (["report"], ["records.duckdb does not exist", "run an experiment first"]),
    ],
)
def test_values_that_cannot_be_used(arguments, parts):
    line = refused(*arguments)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,many,5\n", ["line 2", "'many'"]),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,5\n", ["line 2", "3 values"]),
        ("a.jsonl", '{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [0]}\n{"a"\n', ["line 2"]),
        ("a.jsonl", '{"timestamp": 0, "input_length": -9, "output_length": 5, "hash_ids": [0]}\n', ["line 1", "-9"]),
        ("a.txt", "hello\n", ["line 1", "'hello'", "TIMESTAMP"]),
        ("a.csv", "", ["is empty"]),
    ],
)
def test_traces_that_cannot_be_read(name, text, parts):
    Path(name).write_text(text)
    line = refused("characterize", "trace_replay", "--trace", name)
    assert all(part in line for part in [name, *parts]), line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("promt_tokens = [1]", ["unknown setting in 'study.toml'", "did you mean 'prompt_tokens'"]),
        ("prompt_tokens = 1", ["prompt_tokens=1", "square brackets"]),
        ("prompt_tokens = [0]", ["prompt_tokens=(0,)", "at least 1"]),
        ('experiments = ["prompt_lenght"]', ["unknown experiment 'prompt_lenght'", "did you mean 'prompt_length'"]),
        ('preset = "quik"', ["unknown preset 'quik'", "did you mean 'quick'"]),
        ("prompt_tokens = [1", ["'study.toml' is not TOML", "mend it"]),
    ],
)
def test_studies_that_cannot_be_read(text, parts):
    Path("study.toml").write_text(text)
    line = refused("characterize", "--config", "study.toml")
    assert all(part in line for part in parts), line


def broken_checkpoint(spoil):
    folder = shutil.copytree(BUNDLED_DIR, "model")
    spoil(Path(folder))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda folder: cut(folder / "model.safetensors", 5000), ["truncated or corrupt", "download it again"]),
        (lambda folder: cut(folder / "config.json", 40), ["config.json", "cannot be read", "download it again"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["'model'", "cannot be loaded"]),
        (lambda folder: cut(folder / "tokenizer.json", 500), ["tokenizer of 'model'"]),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llamb"}'), ["llamb"]),
    ],
)
def test_checkpoints_that_are_broken(spoil, parts):
    broken_checkpoint(spoil)
    line = refused("generate", "hi", "--model", "model")
    assert all(part in line for part in parts), line
    assert line == refused(*once(*SWEEP, "--speed-model", "model"))


def test_a_family_that_is_not_supported():
    config = AutoConfig.for_model("bloom", vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained("bloom")
    line = refused("generate", "hi", "--model", "bloom")
    assert "model family 'bloom' cannot run here: " in line
    assert "use another" in line


def test_a_whole_process_prints_nothing_beside_the_line():
    """Libraries that log to the standard error are caught only here."""
    command = [sys.executable, "-m", "kvatlas", "generate", "one two three " * 3000]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: prompt of 12001 tokens")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [SWEEP, ["report"]])
def test_records_files_that_are_not_ours(command):
    Path("text.duckdb").write_text("hello, this is not a database")
    Path("empty.duckdb").touch()
    with duckdb.connect("foreign.duckdb") as foreign:
        foreign.execute("CREATE TABLE sales (amount INTEGER)")
    with RecordStore("newer.duckdb"):
        pass
    with duckdb.connect("newer.duckdb") as newer:
        newer.execute("UPDATE meta SET schema_version = 99")
    assert "not a DuckDB database" in refused(*command, "--records", "text.duckdb")
    assert "is empty" in refused(*command, "--records", "empty.duckdb")
    assert "not a kvatlas records file (tables: sales)" in refused(*command, "--records", "foreign.duckdb")
    assert "schema version 99" in refused(*command, "--records", "newer.duckdb")


def test_folders_that_cannot_be_written():
    Path("file").touch()
    line = refused(*SWEEP, "--records", "file/r.duckdb")
    assert "file cannot be created" in line and "choose another" in line
    with RecordStore("r.duckdb"):
        pass
    line = refused("report", "--records", "r.duckdb", "--out", "file/page")
    assert "is not a folder" in line and "choose another" in line


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 2000 + "z"])
def test_paths_that_no_file_system_takes(name):
    for line in (refused(*SWEEP, "--records", name), refused("report", "--records", name)):
        assert "cannot be" in line or "does not exist" in line


def test_a_report_folder_whose_name_is_too_long():
    assert "cannot be made (File name too long)" in refused("report", "--out", "x" * 300)


def test_a_records_file_without_points():
    with RecordStore("r.duckdb"):
        pass
    assert "no points; run `kvatlas characterize`" in refused("report", "--records", "r.duckdb")


def test_two_runs_on_one_records_file():
    with RecordStore("r.duckdb"):
        pass
    hold = "from kvatlas.records.store import RecordStore; store = RecordStore('r.duckdb'); print(); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        holder.stdout.readline()
        for command in (SWEEP, ["report"]):
            line = refused(*command, "--records", "r.duckdb")
            assert f"(process {holder.pid})" in line and "use another file" in line
        holder.communicate("\n")
    assert holder.returncode == 0


def test_an_interrupted_start_leaves_no_records_file(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvatlas.experiments.lab.load_model", interrupted)
    result = kvatlas(*SWEEP)
    assert result.status == 130
    assert not list(Path.cwd().rglob("*.duckdb"))
