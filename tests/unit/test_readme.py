"""What the documents say exists: the strategy table is current, commands parse, names resolve, the example runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from tests.families import tiny_model
from tools.readme_table import BEGIN, END, main, with_table

from kvatlas.cli.main import app
from kvatlas.strategies.registry import stages

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src/kvatlas").rglob("*.py")))
TEXTS = SOURCE + "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))

PROGRAMS = ("kvatlas", "make", "python", "pip")
FOLDERS = ("", "src/kvatlas", "docs")  # what a path in a document may be relative to, beside the document's own folder


def shell_lines(text: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def command_lines(text: str) -> list[str]:
    """Return the command lines of shell blocks and of inline code."""
    found = shell_lines(text) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return [line for line in dict.fromkeys(found) if line.split()[:1] and line.split()[0] in PROGRAMS and " " in line]


LINES = list(dict.fromkeys(line for name in DOCUMENTS for line in command_lines((ROOT / name).read_text("utf-8"))))


def prose(text: str) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_table_is_current() -> None:
    assert main(["--check"]) == 0, "run python tools/readme_table.py"
    table = README.partition(BEGIN)[2].partition(END)[0]
    assert all(f"`{stage()}`" in table for stage in stages().values())


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, BEGIN + END + END, BEGIN + BEGIN + END + BEGIN])
def test_table_wants_its_markers(text: str) -> None:
    with pytest.raises(ValueError, match="wants one"):
        with_table(text)


@pytest.mark.parametrize("line", LINES)
def test_command_lines_exist(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    {"kvatlas": check_kvatlas, "make": check_make, "python": check_python, "pip": check_pip}[program](arguments)


def check_kvatlas(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    found = command.commands[arguments[0]]
    found.make_context(arguments[0], arguments[1:])  # fails for an unknown option


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(arguments) <= set(targets)


def check_python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "pytest"]:
        scripts = [ROOT / argument for argument in arguments if argument.endswith(".py")]
        tests = [arguments[arguments.index("-k") + 1]] if "-k" in arguments else []
        assert all(script.is_file() for script in scripts) and all(f"{name}(" in TEXTS for name in tests)
        return
    if arguments[0] == "-m":
        arguments = [arguments[1].replace(".", "/") + ".py", *arguments[2:]]
    script = (ROOT / arguments[0]).read_text(encoding="utf-8")
    assert all(f'"{argument}"' in script for argument in arguments[1:] if argument.startswith("--"))


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    files = [arguments[place + 1] for place, argument in enumerate(arguments) if argument == "-c"]
    assert files and all((ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_exist(document: str) -> None:
    """Dotted names resolve, functions and methods are defined, files and links are there."""
    text = prose((ROOT / document).read_text(encoding="utf-8"))
    code = set(re.findall(r"`([^`\n]+)`", text))
    files = {name for name in code if re.fullmatch(r"[\w<>./-]+\.(py|md|txt|toml)", name)}
    members = {name for name in code - files if re.fullmatch(r"[A-Z]\w+\.\w+", name)}
    wrong = [name for name in code if re.fullmatch(r"kvatlas(\.\w+)+", name) and not resolves(name)]
    wrong += [name for name in members if not is_member(name)]
    wrong += [name for name in files if not is_file(name, document)]
    wrong += [
        name for name in code if re.fullmatch(r"_?[a-z]+(_[a-z]+)+", name) and not re.search(rf"\b{name}\b", TEXTS)
    ]
    links = re.findall(r"\]\(([^)#]+)\)", text)
    wrong += [link for link in links if "://" not in link and not ((ROOT / document).parent / link).exists()]
    assert not wrong


def resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def is_member(name: str) -> bool:
    """Whether a class of the package has this method or field, `Engine.step` for instance, by its text."""
    owner, member = name.split(".")
    body = re.search(rf"^class {owner}\b.*?(?=^\S|\Z)", SOURCE, re.MULTILINE | re.DOTALL)
    return body is not None and re.search(rf"(def |self\.|^    ){member}\b", body[0], re.MULTILINE) is not None


def is_file(name: str, document: str) -> bool:
    places = (*(ROOT / folder for folder in FOLDERS), (ROOT / document).parent)
    names_one = "/" not in name and any(ROOT.glob(f"src/kvatlas/**/{name}"))
    return "<" in name or names_one or any((place / name).is_file() for place in places)


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    model = tiny_model("llama", num_hidden_layers=2)
    exec(found[1], {"model": model, "ids": torch.tensor([[1, 2, 3]])})
    assert capsys.readouterr().out.strip()
