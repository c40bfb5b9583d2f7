"""Files and entry points: imported once, named in the error if they fail, and then of no effect."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.strategies import plugins
from kvatlas.strategies.plugins import GROUP, VARIABLE, load_file, load_files, load_installed
from kvatlas.strategies.registry import stages

pytestmark = pytest.mark.usefixtures("own_stages")

STAGE = """
import kvatlas
from dataclasses import dataclass

@kvatlas.register("{name}", summary="newest tokens")
@dataclass(frozen=True, kw_only=True)
class {kind}(kvatlas.Keep):
    budget: int = 8
    def limits(self, prompt_tokens): return kvatlas.Limits.steady(self.budget)
    def scores(self, view): return view.positions_BHS.float()
"""


def write(folder: Path, text: str | None = None, file: str = "own.py", name: str = "mine", kind: str = "Mine") -> Path:
    path = folder / file
    path.write_text(STAGE.format(name=name, kind=kind) if text is None else text)
    return path


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    path = write(tmp_path)
    load_file(path)
    mine = stages()["mine"]
    load_file(path)
    assert stages()["mine"] is mine and str(mine()) == "mine(budget=8)" and mine.__module__ == str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nimport nonsense", "line 2: ModuleNotFoundError: No module named 'nonsense'"),
        ("x = 1\n\nraise SystemExit(3)", "line 3: SystemExit: 3"),
        ("def", r"own.py, line 1 is not Python \(invalid syntax\)"),
        ("a\0b", "null bytes"),
        ("x = 1", r"it registers no stage; decorate one with @kvatlas.register"),
        (STAGE.format(name="h2o", kind="Mine"), "two stages are called 'h2o': H2O of kvatlas.strategies.keep.h2o and"),
        (STAGE.format(name="mine", kind="Mine") + "\n1 / 0", "line 12: ZeroDivisionError: division by zero"),
    ],
)
def test_files_that_fail_leave_nothing(tmp_path: Path, text: str, said: str) -> None:
    path, before = write(tmp_path, text), stages()
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"plugin .*own.py' is refused: .*{said}"):
            load_file(path)
    assert stages() == before and str(path) not in sys.modules


def test_a_file_that_is_mended_is_imported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_file(write(tmp_path, "1 / 0"))
    load_file(write(tmp_path))
    assert "mine" in stages()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py", "cannot be read .No such file or directory.; check the path"),
        ("folder.py", "cannot be read .Is a directory."),
        ("nul\0.py", "cannot be read .*null"),
        ("notes.txt", "is not Python; name a file that ends in .py"),
    ],
)
def test_paths_that_are_no_python_file(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=said):
        load_file(tmp_path / name)


def test_one_file_imported_in_two_ways_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path, file="own_twice.py")
    load_file(path)
    monkeypatch.delitem(sys.modules, "own_twice", raising=False)
    mine = importlib.import_module("own_twice").Mine
    assert stages()["mine"] is mine and mine.__module__ == "own_twice"


def test_two_files_of_one_name_are_two(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    load_files([write(tmp_path / "a"), write(tmp_path / "b", name="other")])
    assert {"mine", "other"} <= set(stages())
    with pytest.raises(ConfigError, match=r"two stages are called 'mine': Mine of .*own.py and Mine of .*third.py"):
        load_file(write(tmp_path, file="third.py"))


def test_processes_that_are_started_know_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    load_files([Path("own.py")])
    load_files([Path("own.py")])
    assert os.environ[VARIABLE] == str(tmp_path / "own.py")
    code = "from kvatlas import Strategy; print(Strategy.parse('mine(budget=3) | fp16'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.stdout == "mine(budget=3) | fp16\n", done.stderr


def entries(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    found = [EntryPoint(name=f"entry{place}", value=value, group=GROUP) for place, value in enumerate(values)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found if group == GROUP else [])


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, file="good_module.py")
    write(tmp_path, file="good_class.py", name="other", kind="Other")
    write(tmp_path, file="clashing.py", name="h2o")
    write(tmp_path, STAGE.format(name="half", kind="Half") + "\n1 / 0", file="failing.py")
    entries(monkeypatch, "failing", "good_module", "good_class:Other", "clashing", "not_there", "good_module:Nothing")
    with caplog.at_level(logging.WARNING):
        load_installed()
    assert {"mine", "other"} <= set(stages()) and "half" not in stages()
    failed = {
        "entry0": "ZeroDivisionError: division by zero",
        "entry3": "two stages are called 'h2o': H2O of kvatlas.strategies.keep.h2o and Mine of clashing",
        "entry4": "No module named 'not_there'",
        "entry5": "AttributeError: module 'good_module' has no attribute 'Nothing'",
    }
    assert len(caplog.messages) == len(failed)
    for (name, why), line in zip(failed.items(), caplog.messages, strict=True):
        assert line.startswith(f"strategies of {name!r} (") and f"are left out: {why}" in line.replace(
            "ModuleNotFoundError: ", ""
        )
