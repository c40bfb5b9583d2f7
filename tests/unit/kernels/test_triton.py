from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvatlas.core.errors import ConfigError
from kvatlas.kernels import triton_support
from kvatlas.kernels.dispatch import choose

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'kvatlas[gpu]'"
)


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
@pytest.mark.timeout(1800)
def test_the_engine_on_these_forms_agrees_in_the_interpreter() -> None:
    done = run("-m", "pytest", "-n", "0", "-m", "slow or not slow", str(HERE / "interpreted_triton.py"), interpret=True)
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


def test_flashinfer_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVATLAS_KERNELS", "flashinfer")
    with pytest.raises(ConfigError, match=r"KVATLAS_KERNELS=flashinfer cannot run here.*CUDA"):
        choose(torch.device("cpu"), native=True, triton=True, flashinfer=True)


def test_without_the_package_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda _: None)
    reason = triton_support.why_not.__wrapped__(torch.device("cuda"))
    assert "kvatlas[gpu]" in reason
