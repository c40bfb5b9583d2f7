"""Whole processes: ``python -m kvatlas`` with arguments, surroundings and streams that a shell can give it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from random import Random

from tests.fuzz.commands import TEXTS, judge_output
from tests.fuzz.harness import HANG_S, Case, Hang, Raw, Target
from tests.fuzz.workplace import Workplace

_SETTINGS: tuple[dict[str, str], ...] = (
    *(
        {},
        {},
        {},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "1"},
        {"COLUMNS": "x"},
    ),
    *(
        {"KVATLAS_KERNELS": "nosuch"},
        {"KVATLAS_KERNELS": "torch"},
        {"KVATLAS_ISA": "nosuch"},
        {"KVATLAS_NATIVE": "/gone.so"},
    ),
    *({"KVATLAS_NATIVE": "off"}, {"KVATLAS_CACHE": "/proc/nosuch"}, {"HOME": "/nosuch", "XDG_CACHE_HOME": "/dev/null"}),
    *({"OMP_NUM_THREADS": "x"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"FORCE_COLOR": "1"}),
)
_STREAMS = ("plain", "plain", "plain", "stdin closed", "stdout closed", "stdout full", "stdin binary", "stdin empty")


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: one process; its exit status and its standard error are judged."""
    arguments = _arguments(rng, place)
    settings, streams = rng.choice(_SETTINGS), rng.choice(_STREAMS)

    def run() -> None:
        status, err = _process(arguments, settings, streams)
        if streams == "stdout full" and status == 0 and b"--help" not in arguments and b"-h" not in arguments:
            raise Raw("the disk behind the standard output is full, and nothing was said")
        judge_output(status, err)

    shown = [argument[:200] for argument in arguments]
    return Case(told=f"{settings} python -m kvatlas {shown}, {streams}", run=run, limit_s=60 * HANG_S)


def _process(arguments: Sequence[bytes], settings: Mapping[str, str], streams: str) -> tuple[int, str]:
    command = [os.fsencode(sys.executable), b"-m", b"kvatlas", *arguments]
    stdin = {"stdin binary": b"\xff\xfe\x00\x80def add(", "stdin empty": b""}.get(streams, b"def add(")
    redirected = {"stdin closed": "<&-", "stdout closed": ">&-", "stdout full": ">/dev/full"}.get(streams)
    if redirected is not None:
        command = [b"sh", b"-c", f'exec "$@" {redirected}'.encode(), b"sh", *command]
    limit_s = HANG_S + 3 * _start_s()
    try:
        done = subprocess.run(
            command,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | settings,
            input=None if streams == "stdin closed" else stdin,
            capture_output=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise Hang(f"a process takes more than {limit_s:.0f} s") from error
    return done.returncode, done.stderr.decode(errors="backslashreplace")


@cache
def _start_s() -> float:
    """Return how long a process takes that does nearly nothing, on this machine now."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "kvatlas", "generate", "hi", "--max-tokens", "1"], check=True, capture_output=True
    )
    return time.perf_counter() - start


def _arguments(rng: Random, place: Workplace) -> list[bytes]:
    tiny = ["--model", str(place.checkpoint), "--max-tokens", "2", "--kv-memory", "1MiB"]
    arguments = rng.choice(
        (
            ["strategies"],
            ["info"],
            [],
            ["generate", "hi", *tiny],
            ["generate", "hi", "ho", *tiny],
            ["generate", "--prompt-file", "-", *tiny],
            ["generate", "hi", "--json", *tiny],
            ["characterize", "--list"],
            ["characterize", "--dump-config"],
            ["report", "--records", "nosuch.duckdb"],
            ["drive", "http://127.0.0.1:9", "--name", "x", "--arrivals", "poisson"],
            ["bench", "kernels", "--ops", "nosuch"],
        )
    )
    encoded = [os.fsencode(argument) for argument in arguments]
    for _ in range(rng.choice((0, 1, 1, 2))):
        option = rng.choice(
            (
                b"--strategy",
                b"--model",
                b"--records",
                b"--seed",
                b"--stop",
                b"--json",
                b"--help",
                b"--nosuch",
                b"--dtype",
            )
        )
        text = (
            rng.choice(TEXTS)
            .replace("\x00", "")
            .encode("utf-8", "surrogateescape" if rng.random() < 0.5 else "replace")
        )
        text = rng.choice((text, b"\xff\xfe", text[:1000]))
        encoded += [option] if option in (b"--json", b"--help") else [option, text]
    return encoded


TARGET = Target(name="processes", make=make, share=0.1)
