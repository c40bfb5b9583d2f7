"""``--plugin``: strategies of files, in every command that takes strategies."""

import json
from pathlib import Path

import pytest
from tests.unit.cli.running import kvatlas
from tests.unit.cli.test_help import COMMANDS

OWN = Path(__file__).parents[3] / "examples/own_strategy/own_knorm.py"
TAKING = [name for name, command in COMMANDS.items() if any(param.name == "plugins" for param in command.params)]
NEEDED = {"generate": ["hi"]}

pytestmark = pytest.mark.usefixtures("own_stages")


def test_every_command_that_takes_strategies_takes_files():
    wanted = {"strategy", "strategies"}
    named = [name for name, command in COMMANDS.items() if wanted & {param.name for param in command.params}]
    assert ["strategies", *named] == TAKING


def test_strategies_of_a_file_are_listed_and_run():
    assert "unknown strategy 'own_knorm'" in kvatlas("generate", "hi", "--strategy", "own_knorm").error
    listed = json.loads(kvatlas("strategies", "--json", "--plugin", OWN).out)
    assert next(one for one in listed if one["name"] == "own_knorm")["sentence"] == "own_knorm(budget=0.5)"
    words = ["generate", "def add(a, b):", "--plugin", OWN, "--strategy", "own_knorm(budget=2) | int8", "--json"]
    facts = json.loads(kvatlas(*words, "--max-tokens", 4).out)
    assert facts["strategy"] == "own_knorm(budget=2) | int8" and facts["output_tokens"] == 4


def test_settings_may_name_them():
    words = ["characterize", "prompt_length", "--list", "--plugin", OWN, "--strategy", "own_knorm(budget=0.25)"]
    assert "strategies = ('own_knorm(budget=0.25)',)" in kvatlas(*words).out


@pytest.mark.parametrize("name", TAKING)
def test_a_file_that_fails_is_one_line(name, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nraise ValueError('of\\nmine')")
    words = [*name.split(), *NEEDED.get(name, [])]
    assert kvatlas(*words, "--plugin", path).error == f"plugin '{path}' is refused: line 2: ValueError: of mine"
    assert "No such file" in kvatlas(*words, "--plugin", OWN, "--plugin", tmp_path / "no.py").error
