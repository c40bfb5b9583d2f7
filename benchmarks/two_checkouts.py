"""Is one checkout slower than another?

Both run side by side, each in a process of its own that loads a model once, with native kernels built from its own
sources; cell by cell they take turns, A B, B A, A B. A cell is a prompt alone (1K and 7K tokens) or decode steps
(batch 1 after 1K and after 7K tokens, batch 4 and 16 after 256). Given are the median over pairs of the seconds of
the new one over those of the old one and, over all cells, the median of the pairs' geometric means, each with a 95 %
interval between order statistics. Below 1 the new one is faster.
Expected: an interval that contains 1, or lies below it.

    python benchmarks/two_checkouts.py v0.1.0 .
    python benchmarks/two_checkouts.py HEAD~3 HEAD --pairs 31 --models llama-55m --cells decode --strategy snapkv

What is asked is said by `benchmarks/peers/workers` of the checkout this script is in; both sides need no more than
`Engine`, `SamplingParams` and `load_model`. A revision gets a worktree below ``out/checkouts``, which stays. Ctrl-C
ends with what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from kvatlas.bench.cases import Case
from kvatlas.bench.machine import told_machine
from kvatlas.bench.worker import Worker, WorkerError
from kvatlas.records.manifest import processor_name
from paired import mean_of_cells, median_ratio, turned

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "checkouts"
WORKERS = ROOT / "benchmarks" / "peers" / "workers"
MODELS = {"llama-55m": "random:llama-55m", "llama-125m": "random:llama-125m", "smollm2-135m": "smollm2-135m"}
VOCABULARY = 256  # that every model has; what tokens there are does not change what they cost
TIMEOUT_S = 900.0
START = """
import runpy, sys
source, workers = sys.argv.pop(), sys.argv.pop()
# An editable install would lead every import of kvatlas to one checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
sys.path[:0] = [source, workers]
import kvatlas
assert kvatlas.__file__.startswith(source), kvatlas.__file__
runpy.run_path(workers + "/kvatlas_engine.py", run_name="__main__")
"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of a case.

    Args:
        name: as ``--cells`` and the table call it.
        case: what the engines are asked for; cells of a case share its runs.
        decode: whether it is the median decode step, or the prompt.
    """

    name: str
    case: Case
    decode: bool

    def seconds(self, answer: Mapping[str, Any]) -> float:
        """Return the seconds of a worker's answer."""
        return float(median(answer["step_s"]) if self.decode else answer["prefill_s"])


def _case(batch: int, prompt_tokens: int, steps: int) -> Case:
    return Case(batch=batch, prompt_tokens=prompt_tokens, steps=steps)


SHORT, LONG = _case(1, 1024, 32), _case(1, 7168, 24)
CELLS = (
    Cell(name="prefill 1K", case=SHORT, decode=False),
    Cell(name="decode batch 1", case=SHORT, decode=True),
    Cell(name="decode batch 4", case=_case(4, 256, 24), decode=True),
    Cell(name="decode batch 16", case=_case(16, 256, 16), decode=True),
    Cell(name="prefill 7K", case=LONG, decode=False),
    Cell(name="decode batch 1 at 7K", case=LONG, decode=True),
)
SIDES = ("old", "new")


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """Sources and the kernels built from them.

    Args:
        label: for people.
        path: of the checkout.
        native: the library, or ``off``.
    """

    label: str
    path: Path
    native: str

    def start(self, model: str, strategy: str, threads: int, link: str | None, log: Path) -> Worker:
        """Return a process that has loaded a model.

        Raises:
            WorkerError: it did not start.
        """
        options = {"strategy": strategy, "linear_weights": "auto"} | ({} if link is None else {"link": link})
        settings = {"model": MODELS[model], "threads": threads, "kv_gib": 1, "options": options}
        command = [sys.executable, "-c", START, json.dumps(settings), str(WORKERS), str(self.path / "src")]
        environment = {**os.environ, "KVATLAS_NATIVE": self.native, "OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)
        return Worker(command, environment, log)


def checkout(given: str) -> Checkout:
    """Return a folder's checkout, or a worktree of a revision, with its kernels.

    Raises:
        SystemExit: it is neither, or does not build.
    """
    if (Path(given) / "src" / "kvatlas").is_dir():
        path = Path(given).resolve()
        commit = _run("git", "-C", str(path), "describe", "--always", "--dirty=, changed")
        label = f"{given} ({commit})"
    else:
        commit = _run("git", "-C", str(ROOT), "rev-parse", "--verify", "--short=12", f"{given}^{{commit}}")
        path = OUT / commit
        if not path.exists():
            _run("git", "-C", str(ROOT), "worktree", "add", "--force", "--detach", str(path), commit)
        label = commit if commit.startswith(given) else f"{given} ({commit})"
    return Checkout(label=label, path=path, native=native_library(path))


def native_library(path: Path) -> str:
    """Build the kernels of a checkout, once for equal sources; ``off`` where cmake is missing, for both sides then."""
    if shutil.which("cmake") is None:
        return "off"
    sources = [path / "CMakeLists.txt", *sorted((path / "src" / "native").rglob("*.*"))]
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    built = OUT / "native" / digest / "libkvatlas_native.so"
    if not built.exists():
        print(f"building the kernels of {path}", file=sys.stderr)
        _run("cmake", "-S", str(path), "-B", str(built.parent), "-DCMAKE_BUILD_TYPE=Release")
        _run("cmake", "--build", str(built.parent), "-j", str(os.cpu_count() or 1))
    return str(built)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {' '.join(done.stderr.split())[-500:]}")
    return done.stdout.strip()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds by cell and side, one per pair, under a model and a strategy."""

    model: str
    strategy: str
    seconds: dict[str, dict[str, list[float]]]


def chosen_cells(wanted: Sequence[str]) -> list[Cell]:
    """Return the cells whose name holds one of some texts; all, if there are none.

    Raises:
        SystemExit: there is none of that name.
    """
    names = {cell.name for cell in CELLS}
    found = [
        cell
        for cell in CELLS
        if not wanted or any(text == cell.name or (text in cell.name and text not in names) for text in wanted)
    ]
    if not found:
        raise SystemExit(f"error: no cell is called like {', '.join(wanted)}; there are {_listed(CELLS)}")
    return found


def _listed(cells: Sequence[Cell]) -> str:
    return ", ".join(f"'{cell.name}'" for cell in cells)


def cases_of(cells: Sequence[Cell]) -> dict[Case, list[Cell]]:
    """Return what is asked, once each, and the cells it serves; without decode steps where nobody looks at them."""
    cases: dict[Case, list[Cell]] = {}
    for cell in cells:
        cases.setdefault(cell.case, []).append(cell)
    return {
        case if any(cell.decode for cell in served) else _case(case.batch, case.prompt_tokens, 0): served
        for case, served in cases.items()
    }


def measure(
    checkouts: Mapping[str, Checkout], measured: Measured, cells: Sequence[Cell], options: Any
) -> Iterator[str]:
    """Measure pair by pair into ``measured``; yield a line of progress after each case.

    Raises:
        WorkerError: a side did not start, refused or took too long.
    """
    with ExitStack() as running:
        workers = {}
        for side in SIDES:
            log = OUT / f"{side}.log"
            started = checkouts[side].start(measured.model, measured.strategy, options.threads, options.link, log)
            workers[side] = running.enter_context(started)
        cases = cases_of(cells)
        for case in cases:  # the first is slower: memory is new, and what depends on sizes is prepared
            warm = _case(case.batch, min(case.prompt_tokens, 300), min(case.steps, 2))
            for worker in workers.values():
                worker.ask(warm.prompts(VOCABULARY, -1), warm.steps, TIMEOUT_S)
        for number in range(options.pairs):
            for case, served in cases.items():
                prompts = case.prompts(VOCABULARY, number)
                answers = {s: workers[s].ask(prompts, case.steps, TIMEOUT_S) for s in turned(SIDES, number)}
                for cell in served:
                    for side in SIDES:
                        measured.seconds.setdefault(cell.name, {s: [] for s in SIDES})[side].append(
                            cell.seconds(answers[side])
                        )
                last = (f"{cell.name} {_ratio(measured, cell.name)[-1]:.3f}" for cell in served)
                yield f"{measured.model}, {measured.strategy}: pair {number + 1}/{options.pairs}: {', '.join(last)}"


def _ratio(measured: Measured, cell: str) -> list[float]:
    old, new = (measured.seconds[cell][side] for side in SIDES)
    return [b / a for a, b in zip(old, new, strict=True)]


def summary(everything: Sequence[Measured]) -> dict[str, Any]:
    """Return medians and ratios of each cell, and the ratio over all cells, as plain JSON values."""
    cells, ratios = [], []
    for measured in everything:
        for name, seconds in measured.seconds.items():
            ratio = median_ratio(seconds["new"], seconds["old"])
            ratios.append(_ratio(measured, name))
            cells.append(
                {
                    "model": measured.model, "strategy": measured.strategy, "cell": name, "pairs": ratio.n,
                    **{f"{side}_s": median(seconds[side]) for side in SIDES},
                    "ratio": ratio.estimate, "low": ratio.low, "high": ratio.high, "level": ratio.level,
                    "seconds": seconds,
                }
            )  # fmt: skip
    if not cells:
        return {"cells": [], "overall": None}
    overall = mean_of_cells(ratios)
    told = {"ratio": overall.estimate, "low": overall.low, "high": overall.high, "level": overall.level}
    return {"cells": cells, "overall": told | {"pairs": overall.n}}


def verdict(low: float, high: float, level: float) -> str:
    """Return what an interval of new over old says; too few pairs say nothing."""
    if level < 0.95:
        return f"{level:.0%} only"
    return "slower" if low > 1 else "faster" if high < 1 else ""


def table_of(told: Mapping[str, Any]) -> Table:
    """Return the summary for people."""
    table = Table("model", "strategy", "cell", "pairs", "old, ms", "new, ms", "new / old [95 %]", "")
    for cell in told["cells"]:
        interval = f"{cell['ratio']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
        times = (f"{cell[f'{side}_s'] * 1e3:.2f}" for side in SIDES)
        said = verdict(cell["low"], cell["high"], cell["level"])
        table.add_row(cell["model"], cell["strategy"], cell["cell"], str(cell["pairs"]), *times, interval, said)
    if (overall := told["overall"]) is not None:
        interval = f"{overall['ratio']:.3f} [{overall['low']:.3f}, {overall['high']:.3f}]"
        said = verdict(overall["low"], overall["high"], overall["level"])
        table.add_section()
        table.add_row("geometric mean", "", "", str(overall["pairs"]), "", "", interval, said)
    return table


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("old", help="a checkout's folder or a git revision")
    made.add_argument("new", nargs="?", default=".", help="likewise (default: this folder)")
    made.add_argument("--pairs", type=int, default=15, help="of every cell; fewer than 6 give no interval of 95 %%")
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--strategy", action="append", help="may be given more than once (default: full)")
    made.add_argument("--link", help="emulated way to the host of both, such as 2GB/s,10us")
    made.add_argument("--cells", action="append", default=[], help=f"parts of names of {_listed(CELLS)}")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    made.add_argument(
        "--out", type=Path, default=ROOT / "out" / "two_checkouts.json", help="what was measured, as JSON"
    )
    return made


def main() -> int:
    options = parser().parse_args()
    cells = chosen_cells(options.cells)
    if min(options.pairs, options.threads) < 1:
        raise SystemExit("error: --pairs and --threads want at least 1")
    OUT.mkdir(parents=True, exist_ok=True)
    checkouts = {side: checkout(given) for side, given in zip(SIDES, (options.old, options.new), strict=True)}
    for side in SIDES:
        print(f"{side}: {checkouts[side].label}, kernels {checkouts[side].native}", file=sys.stderr)
    machine = told_machine("benchmarks/two_checkouts.py")
    if (load := machine["load_average"][0]) > 0.5:
        print(f"others use this machine: load {load:.1f}; figures will say little", file=sys.stderr)
    everything: list[Measured] = []
    status = 0
    try:
        for model in options.models:
            for strategy in options.strategy or ["full"]:
                everything.append(Measured(model=model, strategy=strategy, seconds={}))
                for line in measure(checkouts, everything[-1], cells, options):
                    print(line, file=sys.stderr)
                    keep(options.out, machine, checkouts, options, everything)
    except KeyboardInterrupt:
        print("interrupted: what follows is what was measured", file=sys.stderr)
        status = 130
    except WorkerError as error:
        print(f"error: {everything[-1].model}, {everything[-1].strategy}: {error}", file=sys.stderr)
        status = 1
    told = keep(options.out, machine, checkouts, options, everything)
    print(
        f"{processor_name()}, {options.threads} threads; old: {checkouts['old'].label}; new: {checkouts['new'].label}"
    )
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(told))
    print(f"all figures: {options.out}")
    return status


def keep(
    path: Path, machine: Mapping[str, Any], checkouts: Mapping[str, Checkout], options: Any, all_of: Sequence[Measured]
) -> dict[str, Any]:
    """Write the summary, whole or not at all, and return it."""
    sides = {side: {"label": each.label, "native": each.native} for side, each in checkouts.items()}
    told = {**machine, "threads": options.threads, **sides, **summary(all_of)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return told


if __name__ == "__main__":
    sys.exit(main())
