"""Run experiments point by point into a records file: resumable, interruptible, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvatlas.core.errors import CapacityError, KvatlasError
from kvatlas.core.names import unknown_name
from kvatlas.core.units import parse_bytes
from kvatlas.engine.memory import check_kv_memory
from kvatlas.experiments.concurrency import Concurrency
from kvatlas.experiments.early_fact import EarlyFact
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.prompt_length import PromptLength
from kvatlas.experiments.trace_replay import TraceReplay
from kvatlas.models.loading import resolve_dtype
from kvatlas.records.manifest import collect_manifest
from kvatlas.records.schema import Params, Point
from kvatlas.records.store import RecordStore

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (PromptLength(), Concurrency(), EarlyFact(), TraceReplay())
}

PRESETS: dict[str, Settings] = {
    "quick": Settings(
        repeats=6,
        prompt_tokens=(512, 1024, 2048),
        concurrency=(1, 4, 8),
        concurrency_prompt_tokens=512,
        concurrency_output_tokens=16,
        context_tokens=(512, 1024),
        budgets=(0.5, 0.2),
        num_prompts=100,
        trace_requests=16,
        trace_time_scale=0.2,
        trace_length_scale=0.125,
        trace_max_prompt_tokens=1024,
    ),
    "standard": Settings(),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a sweep went: points measured now, found done before, refused or failed."""

    measured: int
    resumed: int
    refused: int
    failed: int


def find_experiments(names: Sequence[str]) -> list[Experiment]:
    """Return the experiments of these names; all of them if none is given.

    Raises:
        UnknownNameError: a name does not exist.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise unknown_name("experiment", name, EXPERIMENTS)
    return [EXPERIMENTS[name] for name in names or EXPERIMENTS]


def check_sweep(experiments: Sequence[Experiment], settings: Settings) -> None:
    """Find out what could never run before a model is loaded or a file is made.

    Raises:
        ConfigError: the dtype or device is unknown.
        UnsupportedError: the device is absent.
        CapacityError: the machine has less memory than ``kv_memory``.
        TraceError: a trace cannot be read.
    """
    resolve_dtype(settings.dtype, settings.device)
    check_kv_memory(parse_bytes(settings.kv_memory), torch.device(settings.device))
    for experiment in experiments:
        experiment.check(settings)


def run_sweep(
    experiments: Sequence[Experiment], settings: Settings, store: RecordStore, command: str, console: Console
) -> Outcome:
    """Measure every point that the store does not have yet, with a progress bar.

    A point that cannot run is recorded with its reason and the sweep goes on. An interrupt leaves whole points only.
    """
    lab = Lab(settings)
    roles = dict.fromkeys(experiment.role for experiment in experiments)
    with console.status("loading models"):
        facts = dict(lab.facts(role) for role in roles)
    store.begin_run(collect_manifest(command, settings.seed, device=settings.device, models=facts))
    todo = [
        (experiment, _conditioned(point, settings))
        for experiment in experiments
        for point in experiment.points(settings, lab.model(experiment.role).name)
    ]
    fresh = [(experiment, point) for experiment, point in todo if not store.is_done(point)]
    statuses: list[str] = []
    with _progress(console) as progress:
        task = progress.add_task("", total=len(todo), completed=len(todo) - len(fresh))
        for experiment, point in fresh:
            progress.update(task, description=f"{experiment.name} {_short(point)}")
            statuses.append(_run_point(experiment, point, lab, store, progress.console.print))
            progress.advance(task)
            if not console.is_terminal:  # a log shows no bar
                console.print(f"{statuses[-1]}: {experiment.name} {_short(point)}", highlight=False, soft_wrap=True)
    return Outcome(
        measured=statuses.count("done"),
        resumed=len(todo) - len(fresh),
        refused=statuses.count("refused"),
        failed=statuses.count("failed"),
    )


def _run_point(experiment: Experiment, point: Point, lab: Lab, store: RecordStore, say: Callable[..., None]) -> str:
    try:
        samples = experiment.measure(point, lab)
    except CapacityError as error:
        store.write_point(point, status="refused", reason=str(error))
        say(f"[yellow]refused[/] {experiment.name} {_short(point)}: {error}", soft_wrap=True)
        return "refused"
    except (KvatlasError, MemoryError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        store.write_point(point, status="failed", reason=reason)
        say(f"[red]failed[/] {experiment.name} {_short(point)}: {reason}", soft_wrap=True)
        return "failed"
    store.write_point(point, samples)
    return "done"


def _conditioned(point: Point, settings: Settings) -> Point:
    """Return the point with everything that changes its samples, so that a resumed sweep mixes no settings."""
    conditions: Params = {
        "dtype": settings.dtype,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "kv_memory_bytes": parse_bytes(settings.kv_memory),
        "max_batched_tokens": settings.max_batched_tokens,
    }
    return point.model_copy(update={"params": point.params | conditions})


def _short(point: Point) -> str:
    first = next(iter(point.params.items()), ("", ""))
    return f"{point.strategy}, {first[0]}={first[1]}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
