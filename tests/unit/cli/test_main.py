import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.cli.running import kvatlas

from kvatlas.cli import strategies
from kvatlas.cli.main import main
from kvatlas.core.errors import ConfigError


def failing(error):
    def stages():
        raise error

    return stages


def test_an_error_for_users_is_one_line_and_status_2(monkeypatch):
    monkeypatch.setattr(strategies, "stages", failing(ConfigError("a=1 is wrong;\n  write a=2")))
    assert kvatlas("strategies").error == "a=1 is wrong; write a=2"


def test_an_interrupt_is_status_130_without_a_traceback(monkeypatch):
    monkeypatch.setattr(strategies, "stages", failing(KeyboardInterrupt()))
    result = kvatlas("strategies")
    assert (result.status, result.err) == (130, "")


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(strategies, "stages", failing(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        kvatlas("strategies")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["strategees"], "strategees"),
        (["generate", "hi", "--max-tokns", "3"], "--max-tokns"),
        (["generate", "hi", "--max-tokens", "many"], "many"),
        (["generate", "hi", "--stop"], "--stop"),
        (["characterize", "--prompt-tokens", "512,big"], "512,big"),
        (["characterize", "--budgets", "0.5;0.2"], "0.5;0.2"),
        (["report", "surplus"], "surplus"),
    ],
)
def test_a_usage_error_is_one_line_that_names_the_help(arguments, named):
    error = kvatlas(*arguments).error
    assert named in error
    assert "--help" in error


def test_a_closed_pipe_is_quiet():
    script = "from kvatlas.cli.main import main; main(['strategies', '--json'])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["strategies"], ["strategies", "--json"], ["report", "--help"], ["--version"]])
def test_a_full_disk_behind_the_output_is_one_line(arguments):
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "kvatlas", *arguments]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the standard output cannot be written (No space left on device); free some space")


@pytest.mark.parametrize(
    ("arguments", "status", "heavy"),
    [
        (["strategies"], 0, {"torch", "transformers", "matplotlib"}),
        (["--help"], 0, {"torch", "transformers", "matplotlib"}),
        (["characterize", "--help"], 0, {"torch", "transformers", "matplotlib"}),
        (["generate", "hi", "--strategy", "h3o"], 2, {"torch", "transformers", "matplotlib"}),
        (["report", "--records", "gone.duckdb"], 2, {"torch", "transformers"}),
    ],
)
def test_what_runs_no_model_loads_no_torch(arguments, status, heavy):
    script = f"""
import sys
from kvatlas.cli.main import main
try:
    main({arguments})
except SystemExit as end:
    assert end.code == {status}, end.code
loaded = {heavy} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_standard_output_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(SystemExit) as ended:
        main(["strategies"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: the standard output is closed")
