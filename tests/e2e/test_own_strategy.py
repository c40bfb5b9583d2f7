"""The example of a strategy of one's own: its test passes beside it, and once it is installed as a package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_strategy"


def python(*arguments: object, folder: Path, path: Path = ROOT / "src") -> str:
    """Return what a fresh interpreter prints; ``path`` comes first where it looks for modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT / "src")])}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_short() -> None:
    lines = [line for path in EXAMPLE.glob("*.*") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) < 60


@pytest.mark.usefixtures("own_stages")
def test_it_passes_its_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "own_knorm", raising=False)
    from test_own_knorm import test_own_knorm

    test_own_knorm()
    for name in ("own_knorm", "test_own_knorm"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("setuptools") is None, reason="building the package needs setuptools")
def test_it_is_found_where_it_is_installed(tmp_path: Path) -> None:
    project, site = tmp_path / "project", tmp_path / "site"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", site)
    python(*pip, project, folder=tmp_path)
    shutil.copy(EXAMPLE / "test_own_knorm.py", tmp_path)
    python("-m", "pytest", "-q", "test_own_knorm.py", folder=tmp_path, path=site)
    listed = json.loads(python("-m", "kvatlas", "strategies", "--json", folder=tmp_path, path=site))
    assert next(one for one in listed if one["name"] == "own_knorm")["paper"] == "arXiv:2406.11430"
    words = ["generate", "def add(a, b):", "--strategy", "own_knorm(budget=4) | fp16", "--max-tokens", 4, "--json"]
    assert json.loads(python("-m", "kvatlas", *words, folder=tmp_path, path=site))["output_tokens"] == 4
