import dataclasses
import shlex

import pytest
import typer.main
from tests.unit.cli.running import kvatlas

from kvatlas import __version__
from kvatlas.cli.main import app
from kvatlas.experiments.experiment import Settings

# A script that uses an option today must run tomorrow: change this list only together with the changelog.
OPTIONS = {
    "strategies": "--json --plugin",
    "info": "",
    "generate": "--prompt-file --model --strategy --plugin --kv-memory --host-memory --link --dtype --device "
    "--linear-weights --max-tokens --min-tokens --temperature --top-k --top-p --seed --stop --stream --no-stream "
    "--json",
    "characterize": "--preset --config --dump-config --records --strategy --plugin --repeats --seed --threads --list "
    "--time-limit --no-time-limit --repeat-limit --speed-model --quality-model --dtype --device --linear-weights "
    "--kv-memory --host-memory --link --max-batched-tokens --prompt-tokens --prompt-model "
    "--breakdown-prompt-tokens --breakdown-output-tokens --breakdown-link --breakdown-model "
    "--concurrency --concurrency-prompt-tokens --concurrency-output-tokens --pool-tries "
    "--output-tokens --output-prompt-tokens --accuracy-task --accuracy-context-tokens "
    "--accuracy-budgets --num-prompts --context-tokens --budgets --turns --num-keys --arrivals "
    "--rates --rate-requests --rate-prompt-tokens --rate-output-tokens --model --model-prompt-tokens "
    "--model-output-tokens --model-batch --trace --trace-requests --trace-time-scale "
    "--trace-length-scale --trace-max-prompt-tokens --slo-ttft --slo-tpot",
    "drive": "--name --preset --records --trace --arrivals --rate --burstiness --prompt-tokens --output-tokens "
    "--requests --time-scale --length-scale --max-prompt-tokens --seed --slo-ttft --slo-tpot --vocabulary "
    "--served-model-name --api-key --timeout --model-name --dtype --device --linear-weights --kv-memory --host-memory "
    "--max-batched-tokens --threads",
    "evaluate": "--task --model --strategy --plugin --limit --fewshot --include --held-back --records --kv-memory "
    "--host-memory --max-batched-tokens --dtype --device --linear-weights --seed",
    "report": "--records --out",
    "bench kernels": "--ops --formats --contexts --batch --threads --repeats --quick",
    "bench engine": "--model --cases --peer --peers --no-peers --strategy --plugin --linear-weights "
    "--max-batched-tokens --threads --repeats --timeout --folder --results --fresh --quick",
    "bench overhead": "--model --batch --prompt-tokens --steps --strategy --plugin --linear-weights --threads --quick",
}
ARGUMENTS = {"generate": ["PROMPT"], "characterize": ["EXPERIMENT"], "drive": ["URL"]}

COMMANDS = {
    " ".join(path): command
    for name, first in typer.main.get_command(app).commands.items()
    for path, command in (
        [((name, below), each) for below, each in first.commands.items()]
        if hasattr(first, "commands")
        else [((name,), first)]
    )
}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_the_commands_are_frozen():
    assert list(COMMANDS) == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_frozen(name):
    options = [param for param in COMMANDS[name].params if param.param_type_name == "option"]
    assert " ".join(text for param in options for text in (*param.opts, *param.secondary_opts)) == OPTIONS[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_help_lists_every_option_and_an_example(name):
    result = kvatlas(*name.split(), "--help")
    assert result.status == 0
    words = result.out.replace(",", " ").split()
    assert set(OPTIONS[name].split()) <= set(words)
    assert set(ARGUMENTS.get(name, [])) <= set(words)
    assert f"$ kvatlas {name}" in result.out


@pytest.mark.parametrize("name", OPTIONS)
def test_examples_can_be_parsed(name):
    lines = kvatlas(*name.split(), "--help").out.split("Examples:")[1].strip().splitlines()
    for line in filter(None, map(str.strip, lines)):
        depth = 2 + len(name.split())
        _, program, *words = shlex.split(line)[:depth]
        assert (program, words) == ("kvatlas", name.split())
        COMMANDS[name].make_context(name, shlex.split(line)[depth:])


def test_every_setting_of_a_sweep_has_an_option():
    assert {field.name for field in dataclasses.fields(Settings)} <= {p.name for p in COMMANDS["characterize"].params}


def test_alone_it_shows_help():
    result = kvatlas()
    assert result.status == 0
    assert all(name.split()[0] in result.out for name in OPTIONS)
    assert "$ kvatlas generate" in result.out


def test_version():
    assert kvatlas("--version").out == f"kvatlas {__version__}\n"
