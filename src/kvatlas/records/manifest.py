"""Collect the facts of a run: commit, versions, hardware. Imports neither torch nor transformers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import psutil

from kvatlas.records.schema import Facts, RunManifest

_PACKAGES = ("kvatlas", "torch", "transformers", "numpy", "duckdb")
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def collect_manifest(
    command: str, seed: int, *, device: str = "cpu", models: Mapping[str, Facts] | None = None
) -> RunManifest:
    """Return the manifest of a run that starts now; runs git and reads /proc where they exist.

    Args:
        command: the command line, as typed.
        seed: the run's seed.
        device: name of the device the models run on, such as "cpu" or "NVIDIA H200".
        models: model name -> facts.
    """
    now = datetime.now(UTC)
    commit, dirty = _git_state()
    return RunManifest(
        run_id=f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}",
        started_at=now.isoformat(timespec="seconds"),
        command=command,
        commit=commit,
        commit_dirty=dirty,
        seed=seed,
        versions=_versions(),
        hardware=_hardware(device),
        models={name: dict(facts) for name, facts in (models or {}).items()},
    )


def _git_state() -> tuple[str | None, bool | None]:
    """Return commit and dirtiness of the checkout that holds this package, or (None, None).

    An installed copy may lie inside some other project's checkout, whose commit would mean nothing here.
    """
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "src" / "kvatlas" != _PACKAGE_FOLDER:
        return None, None
    status = _git("status", "--porcelain")
    return _git("rev-parse", "HEAD") or None, None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_PACKAGE_FOLDER), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    return {
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hardware(device: str) -> Facts:
    """Return what speed depends on; ``usable_threads`` are those this process may run on."""
    cpuinfo = _cpuinfo()
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    return {
        "cpu_model": processor_name(),
        "cpu_features": " ".join(name for name in _CPU_FEATURES if name in flags),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": _usable_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
    }


def processor_name() -> str:
    """Return what the processor calls itself; reads /proc where it exists."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _usable_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """Return the first processor of /proc/cpuinfo, or nothing where the system has none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
