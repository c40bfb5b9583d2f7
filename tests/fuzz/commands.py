"""Command lines in this process: every command and option, with values that fit and values that do not.

What would take minutes once everything is understood (experiments, benchmarks, lm-eval) is left out there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from random import Random
from typing import Any
from unittest import mock

import typer
from tests.fuzz.harness import Case, Raw, RefusedError, Target, untidy
from tests.fuzz.values import odd_text
from tests.fuzz.workplace import Workplace

from kvatlas.cli.main import app, main
from kvatlas.records.store import RecordStore

MOST_LINES = 5
"""Lines that a refusal may take: the error itself, and what was refused one by one before."""

TEXTS = (
    *("", " ", "0", "1", "-1", "2", "1.5", "-0.5", "0.5", "1e3", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000),
    *("٣", "½", "1_000", "0x10", "+3", "None", "true", "auto", "off", "cpu", "cuda", "cuda:9", "meta", "float16"),
    *("full", "h2o(heavy=0.5)", "H2O", "infinigen", "full | full", "a" * 100_000, "\x00", "\ud800", "é\u202e", "[red]"),
    *("-", "--", "--help", "-h", "/dev/null", "/dev/full/x", ".", "..", "/proc/self/mem", "~", "~nobody/x", "C:\\a"),
    *(
        "1,2",
        "1,,2",
        ",",
        "0.5,0.2",
        "1,a",
        "512MiB",
        "1KiB",
        "100TiB",
        "1e9",
        "16GB/s,10us",
        "0B/s",
        "none",
        "poisson",
    ),
    *("random:llama-mini", "random:", "azure-conv", "=", "a=5", "early_fact=5", "gamma 0.25", "file.gguf", "\n", "*"),
    *("decode", "fp16", "4x32+2", "1x8+0", "0x0+0", "1x1e9+1", "quick", "Quick", "piqa", "nosuch", "{'a': 1}", "%n"),
)


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: a command that works, with one to three options that may not."""
    name = rng.choice(sorted(_BASES))
    arguments = _arguments(rng, name, place)

    def run() -> None:
        with _shortened():
            command_line(arguments, stdin="def add(")

    return Case(told=f"kvatlas {arguments!r}", run=run)


def command_line(arguments: Sequence[str], stdin: str = "") -> None:
    """Run a command line in this process.

    Raises:
        RefusedError: it was refused as it should be.
        Raw: its status or what it said is no good.
    """
    out, err, status = StringIO(), StringIO(), None
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "stdin", StringIO(stdin)):
        try:
            main(list(arguments))
        except SystemExit as end:
            status = end.code
    judge_output(status, err.getvalue())


def judge_output(status: object, err: str) -> None:
    """Raise what a status and a standard error amount to; see `command_line`."""
    if type(status) is not int or status not in (0, 1, 2, 130):
        raise Raw(f"status {status!r}: {err[-300:]}")
    if "Traceback" in err:
        raise Raw(f"a traceback is shown: {err[-300:]}")
    if status in (0, 130):
        return
    lines = err.splitlines()
    if not lines or not any(line.startswith("error: ") for line in lines):
        raise Raw(f"status {status} without an error line: {err[-300:]!r}")
    if len(lines) > MOST_LINES:
        raise Raw(f"{len(lines)} lines of errors, first {lines[0][:200]!r}")
    if reason := next((reason for line in lines if (reason := untidy(line)) is not None), None):
        raise Raw(f"an error line {reason}: {lines[-1][:200]!r}")
    raise RefusedError(next(line for line in lines if line.startswith("error: ")))


@cache
def _options() -> dict[str, list[Any]]:
    """Return the parameters of every command, by its name."""
    found: dict[str, list[Any]] = {}
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        for inner, leaf in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = list(leaf.params)
    return found


def _arguments(rng: Random, name: str, place: Workplace) -> list[str]:
    arguments = [*name.split(), *_BASES[name](place)]
    for option in rng.sample(_options()[name], min(len(_options()[name]), rng.choice((0, 1, 1, 2, 3)))):
        text = rng.choice(TEXTS) if rng.random() < 0.9 else odd_text(rng)
        flags = [*option.opts, *option.secondary_opts]
        if option.param_type_name == "argument":
            arguments.append(text)
        elif getattr(option, "is_flag", False):
            arguments.append(rng.choice(flags))
        else:
            arguments += [f"{flags[0]}={text}"] if rng.random() < 0.7 else [flags[0], text]
    if rng.random() < 0.06:
        arguments.insert(
            rng.randrange(len(arguments) + 1), rng.choice(("--nosuch", "-x", "--", "generat", "--help", ""))
        )
    if rng.random() < 0.04:
        arguments = arguments[: rng.randrange(len(arguments))]
    return arguments


def _generate(place: Workplace) -> list[str]:
    return ["hi", "--model", str(place.checkpoint), "--max-tokens", "2", "--kv-memory", "1MiB"]


def _report(place: Workplace) -> list[str]:
    path = place.folder / "empty.duckdb"
    if not path.exists():
        with RecordStore(path):
            pass
    return ["--records", str(path), "--out", str(place.folder / "page")]


_BASES: dict[str, Callable[[Workplace], list[str]]] = {
    "strategies": lambda _: [],
    "info": lambda _: [],
    "generate": _generate,
    "characterize": lambda place: ["--speed-model", str(place.checkpoint), "--records", str(place.folder / "r.duckdb")],
    "drive": lambda place: ["http://127.0.0.1:9", "--name", "x", "--arrivals", "poisson", "--records", "drive.duckdb"],
    "evaluate": lambda place: ["--model", str(place.checkpoint), "--limit", "1", "--records", "evaluate.duckdb"],
    "report": _report,
    "bench kernels": lambda _: ["--quick"],
    "bench engine": lambda _: ["--quick", "--no-peers", "--results", "results.jsonl"],
    "bench overhead": lambda _: [
        "--model",
        "random:llama-mini",
        "--steps",
        "1",
        "--prompt-tokens",
        "8",
        "--batch",
        "1",
    ],
}


@contextmanager
def _shortened() -> Iterator[None]:
    """Leave out what takes minutes, behind the place where all arguments are understood."""
    from kvatlas.experiments.sweep import Outcome

    done = Outcome(measured=1, resumed=0, refused=0, failed=0)
    with ExitStack() as stack:
        for path, answer in (
            ("kvatlas.cli.characterize._run", done),
            ("kvatlas.evaluation.run.evaluate", []),
            ("kvatlas.bench.kernels.measure_kernels", {}),
            ("kvatlas.bench.engine.EngineBench.run", []),
        ):
            stack.enter_context(mock.patch(path, return_value=answer))
        yield


TARGET = Target(name="commands", make=make)
