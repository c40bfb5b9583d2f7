"""Every option of every command: given once, acting or refused; every help text shown as it is written."""

import re

import pytest
from tests.unit.cli.running import kvatlas
from tests.unit.cli.test_help import COMMANDS

SINGLE = [
    (name, param)
    for name, command in COMMANDS.items()
    for param in command.params
    if param.param_type_name == "option" and not param.multiple and not param.is_eager
]


def words(param, count):
    value = [] if param.is_flag else ["1"]
    return [word for _ in range(count) for word in (max(param.opts, key=len), *value)]


@pytest.mark.parametrize(("name", "param"), SINGLE, ids=[f"{name} {param.name}" for name, param in SINGLE])
def test_a_value_that_would_win_in_silence_is_refused(name, param):
    line = kvatlas(*name.split(), *words(param, 3)).error
    assert line.startswith(f"{max(param.opts, key=len)} takes one value but is given 3 times; write ")


def test_lists_may_be_repeated_and_flags_of_two_names_are_one():
    assert kvatlas("characterize", "--list", "--strategy", "full", "--strategy", "h2o").status == 0
    assert "--stream takes one value" in kvatlas("generate", "hi", "--stream", "--no-stream").error
    assert "commas" in kvatlas("characterize", "--rates", "1", "--rates", "2").error


def plain(text):
    """Return the words of a text, whatever the lines and boxes they stand in."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_text_as_it_is_written(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    shown = plain(kvatlas(*name.split(), "--help").out)
    command = COMMANDS[name]
    for text in (command.callback.__doc__, *(param.help for param in command.params if getattr(param, "help", None))):
        assert plain(text.replace("\\[", "[")) in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drive", "http://h", "--name", "n", "--trace", "azure-conv", "--rate", 3], "--rate would do nothing"),
        (["drive", "http://h", "--name", "n", "--trace", "azure-conv", "--prompt-tokens", 3, "--output-tokens", 3],
         "--prompt-tokens and --output-tokens would do nothing: it belongs to --arrivals"),
        (["drive", "http://h", "--name", "n", "--arrivals", "poisson", "--time-scale", 3], "--time-scale would do"),
        (["drive", "http://h", "--name", "n", "--arrivals", "poisson", "--length-scale", 3], "--length-scale would do"),
        (["drive", "http://h", "--name", "n", "--arrivals", "poisson", "--max-prompt-tokens", 3], "it belongs to"),
        (["generate", "hi", "--top-k", 0, "--seed", 3], "--top-k and --seed would do nothing: the temperature is 0"),
        (["bench", "kernels", "--ops", "linear", "--formats", "int4"], "--formats would do nothing"),
        (["bench", "kernels", "--ops", "blocks", "--contexts", 64], "--contexts would do nothing"),
        (["bench", "kernels", "--ops", "decod"], "unknown operation 'decod'; did you mean 'decode'"),
        (["bench", "engine", "--peer", "generate", "--no-peers"], "--peer would do nothing"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(arguments, said):
    assert said in kvatlas(*arguments).error


def test_usage_errors_are_short_too():
    assert len(kvatlas("report", "--" + "x" * 100_000).error) < 400
