from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvatlas.kernels import triton_support

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install 'kvatlas[gpu]'")


def run(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True)


@needs_triton
def test_all_forms_agree_with_their_references_in_the_interpreter() -> None:
    done = run("-m", "pytest", "-n", "0", "-x", str(HERE / "interpreted_triton.py"), interpret=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_all_kernels_compile_ahead_of_time(capability: int, tmp_path: Path) -> None:
    """For GPUs that are not here: every kernel and format, as the forms would launch it."""
    script = HERE / "compile_triton.py"
    done = run("-m", "tests.unit.kernels.compile_triton", str(capability), interpret=False)
    assert script.exists() and done.returncode == 0, done.stdout + done.stderr


def test_the_cpu_has_no_triton_and_the_reason_says_so() -> None:
    assert "cpu" in (triton_support.why_not(torch.device("cpu")) or "")


def test_without_the_package_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda _: None)
    reason = triton_support.why_not.__wrapped__(torch.device("cuda"))
    assert "kvatlas[gpu]" in reason
