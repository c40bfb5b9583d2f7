"""A sweep: limits leave points for another run, models are in the manifest, what fails is recorded with its reason."""

import math
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from tests.unit.experiments.tiny import H2O, TINY, sweep
from transformers import AutoConfig, AutoModelForCausalLM

from kvatlas.core.errors import CapacityError, ConfigError, UnknownNameError
from kvatlas.engine.machine import machine_params
from kvatlas.experiments.pace import Pace, seconds_left
from kvatlas.experiments.prompt_length import PromptLength
from kvatlas.experiments.sweep import EXPERIMENTS, check_sweep, find_experiments, run_sweep
from kvatlas.records.schema import Sample
from kvatlas.records.store import RecordStore

SETTINGS = replace(TINY, strategies=("full", H2O), prompt_tokens=(16, 32, 48))


@pytest.fixture
def records(tmp_path):
    return tmp_path / "r.duckdb"


@pytest.fixture
def measured(monkeypatch):
    """Points that were measured, each in no time."""
    found = []

    def measure(self, point, lab):
        found.append(point)
        return [Sample(metric="ttft", unit="s", value=1.0)]

    monkeypatch.setattr(PromptLength, "measure", measure)
    return found


def points(path):
    with RecordStore(path, mode="read") as store:
        return store.points()


def test_a_time_limit_leaves_points_for_the_same_command(records, measured):
    settings = replace(SETTINGS, time_limits=("1e-9",))
    outcome, printed = sweep(records, settings, "prompt_length")
    assert (outcome.measured, outcome.left_out) == (1, {"prompt_length": 5})
    assert "left out prompt_length: 5 of 6 points" in printed
    assert len(points(records)) == 1  # what was left out is not recorded
    outcome, _ = sweep(records, settings, "prompt_length")
    assert (outcome.measured, outcome.resumed, outcome.left_out) == (1, 1, {"prompt_length": 4})
    outcome, printed = sweep(records, replace(settings, time_limits=()), "prompt_length")
    assert (outcome.measured, outcome.resumed, outcome.left_out) == (4, 2, {})
    assert "left out" not in printed
    assert len({point.key for point in measured}) == len(measured) == 6


def test_another_machine_measures_the_same_points_again(records, measured, monkeypatch):
    assert sweep(records, SETTINGS, "prompt_length")[0].measured == 6
    assert sweep(records, SETTINGS, "prompt_length")[0].resumed == 6
    monkeypatch.setattr("kvatlas.engine.machine.processor_name", lambda: "another processor")
    assert sweep(records, SETTINGS, "prompt_length")[0].measured == 6
    monkeypatch.setenv("KVATLAS_KERNELS", "torch")
    assert sweep(records, SETTINGS, "prompt_length")[0].measured == 6
    assert sweep(records, SETTINGS, "prompt_length")[0].resumed == 6


def test_records_of_before_go_on_where_they_were_written(records, measured, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("kvatlas.experiments.sweep.machine_params", lambda device: {})
        sweep(records, SETTINGS, "prompt_length")
    assert sweep(records, SETTINGS, "prompt_length")[0].resumed == 6
    monkeypatch.setattr("kvatlas.engine.machine.processor_name", lambda: "another processor")
    assert sweep(records, SETTINGS, "prompt_length")[0].resumed == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "cpu"])
def test_points_name_the_gpu_that_measured_them(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"gpu {place}")
    named = {"cpu": None, "cuda:7": "unknown"}.get(device, "gpu 0")
    assert machine_params(device).get("accelerator") == named


def test_each_experiment_has_its_own_time(records, measured):
    outcome, _ = sweep(
        records, replace(SETTINGS, time_limits=("prompt_length=1e-9",)), "prompt_length", "output_length"
    )
    assert outcome.left_out == {"prompt_length": 5}
    assert outcome.measured == 1 + 2


def test_what_is_named_twice_is_measured_once(records, measured):
    outcome, _ = sweep(records, replace(SETTINGS, strategies=("full", "full"), prompt_tokens=(16, 16)), "prompt_length")
    assert outcome.measured == len(measured) == 1


def test_an_experiment_named_twice_is_run_once(records, measured):
    assert [one.name for one in find_experiments(["early_fact", "prompt_length", "early_fact"])] == [
        *("early_fact", "prompt_length")
    ]
    outcome = run_twice(records)
    assert outcome.measured == len(measured) == 6


def run_twice(path):
    with RecordStore(path) as store:
        named = find_experiments(["prompt_length", "prompt_length"])
        return run_sweep(named, SETTINGS, store, "test", Console(file=StringIO()))


def test_another_model_in_a_folder_of_the_same_name_is_measured(records, measured, tmp_path):
    outcomes = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / place / "m"
        folder.parent.mkdir()
        random_checkpoint(folder, seed)
        settings = replace(SETTINGS, strategies=("full",), prompt_tokens=(16,), prompt_model=str(folder))
        outcomes.append(sweep(records, settings, "prompt_length")[0])
    assert [(one.measured, one.resumed) for one in outcomes] == [(1, 0), (0, 1), (1, 0)]


def random_checkpoint(folder, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_pace():
    now = [0.0]
    pace = Pace(limit_s=10.0, total=4, clock=lambda: now[0])
    assert pace.begin() and pace.spent_s == 0  # the first point may begin, and starts the time
    now[0], pace.done = 9.9, 1
    assert pace.begin()
    now[0] = 10.0
    assert not pace.begin()
    assert pace.left == 3


@pytest.mark.parametrize(
    ("limit", "coming", "expected"),
    [
        (math.inf, [], 6.0),  # three points of two seconds
        (5.0, [], 3.0),  # the limit comes first
        (math.inf, [Pace(limit_s=math.inf, total=10)], 26.0),
        (math.inf, [Pace(limit_s=7.0, total=10), Pace(limit_s=7.0, total=0)], 13.0),
        (1.0, [], 0.0),  # beyond the limit already
    ],
)
def test_what_is_left_respects_limits(limit, coming, expected):
    now = [0.0]
    pace = Pace(limit_s=limit, total=4, clock=lambda: now[0])
    pace.begin()
    now[0], pace.done = 2.0, 1
    assert seconds_left(pace, coming) == expected


def test_nothing_is_foretold_before_a_point_is_done():
    assert seconds_left(Pace(limit_s=math.inf, total=4), []) is None
    assert seconds_left(Pace(limit_s=9.0, total=4), [Pace(limit_s=3.0, total=2)]) == 12.0


def test_every_model_measured_is_in_the_manifest(records):
    outcome, _ = sweep(records, replace(SETTINGS, strategies=("full",), models=("random:llama-long",)), "model_size")
    assert outcome.measured == 1
    with RecordStore(records, mode="read") as store:
        (run,) = store.runs()
        (point,) = store.points()
    assert point.point.model == "random:llama-long"
    assert run.models["random:llama-long"]["layers"] == 4
    assert run.models["random:llama-long"]["role"] == "speed"


def test_a_point_says_under_what_it_was_measured(records, measured):
    sweep(records, replace(SETTINGS, link="16GB/s", host_memory="0"), "prompt_length")
    params = points(records)[0].point.params
    assert (params["link"], params["host_memory_bytes"], params["kv_memory_bytes"]) == ("16 GB/s", 0, 16 * 2**20)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no 2 GiB\nleft"), MemoryError()])
def test_running_out_of_memory_is_a_refusal(records, measured, monkeypatch, error):
    def measure(self, point, lab):
        raise error

    monkeypatch.setattr(PromptLength, "measure", measure)
    outcome, printed = sweep(records, SETTINGS, "prompt_length")
    assert outcome.refused == 6
    assert "out of memory" in printed and "out of memory" in points(records)[0].reason


def test_a_model_that_cannot_be_loaded_fails_its_points_alone(records, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    settings = replace(SETTINGS, strategies=("full",), models=(str(folder), "random:llama-long"))
    outcome, _ = sweep(records, settings, "model_size")
    assert (outcome.failed, outcome.measured) == (1, 1)
    assert "cannot be loaded" in next(point.reason for point in points(records) if point.status == "failed")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"time_limits": ("early_fct=5",)}, UnknownNameError, "did you mean 'early_fact'"),
        ({"time_limits": ("soon",)}, ConfigError, "'soon' is not understood"),
        ({"models": ("random:llama-9t",)}, UnknownNameError, "llama-mini"),
        ({"accuracy_tasks": ("hay",)}, ConfigError, "unknown task 'hay'"),
        ({"arrivals": ("posson",)}, ConfigError, "'posson'"),
        ({"host_memory": "900TiB"}, CapacityError, "host memory of 900 TiB exceeds"),
    ],
)
def test_what_could_never_run_is_found_before_anything_does(changes, error, text):
    with pytest.raises(error, match=text):
        check_sweep(list(EXPERIMENTS.values()), replace(SETTINGS, **changes))
