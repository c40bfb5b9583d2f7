"""An option of ``characterize`` acts on the chosen experiments or is refused: every option, every experiment."""

from dataclasses import fields, replace

import pytest
from tests.unit.cli.running import kvatlas
from tests.unit.experiments.tiny import TINY, samples_of

from kvatlas.experiments.experiment import REPEATED
from kvatlas.experiments.settings import Settings
from kvatlas.experiments.sweep import EXPERIMENTS, conditioned

BASE = replace(TINY, strategies=("full", "offload(host)", "h2o(heavy=0.25, recent=0.25)"))
OTHER = {
    "strategies": ("full", "offload(host, false)", "h2o(heavy=0.5, recent=0.25)", "snapkv(budget=9, window=2)"),
    "quality_model": "a/model",
    "speed_model": "random:llama-mini",
    "prompt_model": "random:llama-55m",
    "breakdown_model": "random:llama-55m",
    "models": ("random:llama-mini",),
    "dtype": "float32",
    "device": "cuda",
    "linear_weights": "off",
    "kv_memory": "17MiB",
    "host_memory": "17MiB",
    "link": "1GB/s",
    "breakdown_links": ("1GB/s",),
    "accuracy_tasks": ("3 keys",),
    "arrivals": ("poisson",),
    "traces": ("mooncake-conversation",),
    "trace_time_scale": 1.0,
}
NOT_IN_POINTS = {"seed", "time_limits", *REPEATED}  # of the run, of its length, and how often it is measured
SPEED = [name for name, experiment in EXPERIMENTS.items() if experiment.role == "speed"]
BASE = replace(BASE, speed_model="random:llama-long")


def other(name):
    """Return a value of a setting that differs from the base's."""
    value = getattr(BASE, name)
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, tuple):
        return tuple(one + 1 if isinstance(one, int) else one / 2 for one in value)
    return value + 1 if isinstance(value, int) else value / 2


def keys(experiment, settings):
    """Return what tells the points apart: what an experiment measures under these settings."""
    return {
        conditioned(point, settings).key
        for source in experiment.sources(settings)
        for point in experiment.points(settings, str(source))
    }


def given_as(name, value):
    """Return a setting as it stands on a command line."""
    option = {
        "strategies": "--strategy", "models": "--model", "traces": "--trace", "accuracy_tasks": "--accuracy-task",
        "breakdown_links": "--breakdown-link", "time_limits": "--time-limit", "slo_ttft_s": "--slo-ttft",
        "slo_tpot_s": "--slo-tpot", "repeat_limit_s": "--repeat-limit",
    }.get(name, f"--{name.replace('_', '-')}")  # fmt: skip
    if isinstance(value, tuple) and name not in ("strategies", "models", "traces", "accuracy_tasks", "breakdown_links"):
        return [option, ",".join(map(str, value))] if name != "arrivals" else [option, value[0]]
    return [word for one in (value if isinstance(value, tuple) else (value,)) for word in (option, one)]


@pytest.mark.parametrize("name", [field.name for field in fields(Settings) if field.name not in NOT_IN_POINTS])
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_what_is_read_changes_the_points_and_nothing_else_does(experiment, name):
    changed = replace(BASE, **{name: other(name)})
    assert (name in experiment.reads(BASE)) is (keys(experiment, changed) != keys(experiment, BASE))


def pairs():
    """Yield every experiment with every setting; fast is one that reads the setting and one that does not."""
    for number, field in enumerate(fields(Settings)):
        readers = [name for name, experiment in EXPERIMENTS.items() if field.name in experiment.reads(BASE)]
        others = [name for name in EXPERIMENTS if name not in readers]
        fast = {names[number % len(names)] for names in (readers, others) if names}  # another one for each setting
        for name, experiment in EXPERIMENTS.items():
            marks = [] if name in fast else pytest.mark.slow
            yield pytest.param(experiment, field.name, marks=marks, id=f"{name}-{field.name}")


@pytest.mark.parametrize(("experiment", "name"), pairs())
def test_the_command_refuses_what_is_not_read(experiment, name):
    value = ("60",) if name == "time_limits" else 5.0 if name == "repeat_limit_s" else other(name)
    result = kvatlas("characterize", experiment.name, "--list", *given_as(name, value))
    if name in experiment.reads(BASE):
        assert result.status == 0, result
    else:
        assert f"would do nothing: it is not read by {experiment.name}" in result.error


@pytest.mark.parametrize("experiment", ["prompt_length", "offload_breakdown"])
def test_a_model_of_its_own_stands_in_for_the_speed_model(experiment):
    own = "--prompt-model" if experiment == "prompt_length" else "--breakdown-model"
    line = kvatlas("characterize", experiment, own, "random:llama-55m", "--speed-model", "random:llama-mini").error
    assert line.startswith("--speed-model would do nothing") and f"whose model is {own}" in line


def test_all_experiments_together_read_everything():
    together = frozenset().union(*(experiment.reads(Settings()) for experiment in EXPERIMENTS.values()))
    assert together == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("name", ["prompt_length", "model_size", "request_rate", "early_fact"])
def test_repeats_are_read_where_points_are_repeated(name):
    once, twice = (samples_of(name, replace(TINY, repeats=count), "full") for count in (1, 2))
    more = any(len(later) > len(first) for (_, first), (_, later) in zip(once, twice, strict=True))
    assert more is ("repeats" in EXPERIMENTS[name].reads(TINY))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["early_fact", "--time-limit", "prompt_length=3"], "'prompt_length=3' would do nothing: only early_fact runs"),
        (["--time-limit", "3", "--no-time-limit"], "--time-limit would do nothing: --no-time-limit is given too"),
        (["--time-limit", "3", "--time-limit", "4"], "'4' contradicts an earlier one"),
        (["--list", "--threads", "2"], "--threads would do nothing: --list runs nothing"),
        (["--list", "--records", "x"], "--records would do nothing"),
        (["--list", "--dump-config"], "--list would do nothing"),
        (["--dump-config", "--threads", "2"], "--threads would do nothing"),
        (["offload_breakdown", "--strategy", "full"], "no point under full"),
    ],
)
def test_options_that_contradict_each_other(arguments, said):
    assert said in kvatlas("characterize", *arguments).error


def test_a_file_may_hold_settings_of_experiments_that_do_not_run(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text(kvatlas("characterize", "--dump-config").out)
    assert kvatlas("characterize", "early_fact", "--config", study, "--list").status == 0
