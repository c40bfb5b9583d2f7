"""Run experiments point by point into a records file: resumable, interruptible, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.markup import escape

from kvatlas.core.errors import CapacityError, ConfigError, KvatlasError
from kvatlas.core.names import unknown_name
from kvatlas.core.units import format_seconds, parse_bytes, parse_tier_bytes
from kvatlas.engine.machine import accelerator_name, machine_params
from kvatlas.engine.memory import check_host_memory, check_kv_memory
from kvatlas.experiments.accuracy_budget import AccuracyBudget
from kvatlas.experiments.concurrency_memory import ConcurrencyMemory
from kvatlas.experiments.decode_throughput import DecodeThroughput
from kvatlas.experiments.display import Display, short
from kvatlas.experiments.early_fact import EarlyFact
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.model_size import ModelSize
from kvatlas.experiments.offload_breakdown import OffloadBreakdown
from kvatlas.experiments.output_length import OutputLength
from kvatlas.experiments.pace import Pace
from kvatlas.experiments.presets import PRESETS
from kvatlas.experiments.prompt_length import PromptLength
from kvatlas.experiments.request_latency import RequestLatency
from kvatlas.experiments.request_rate import RequestRate
from kvatlas.experiments.settings import link_name, time_limit
from kvatlas.experiments.trace_replay import TraceReplay
from kvatlas.models.precision import resolve_dtype
from kvatlas.records.contents import model_params
from kvatlas.records.manifest import collect_manifest
from kvatlas.records.schema import Params, Point
from kvatlas.records.store import RecordStore

__all__ = ["EXPERIMENTS", "PRESETS", "Outcome", "check_sweep", "conditioned", "find_experiments", "run_sweep"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        PromptLength(),
        OffloadBreakdown(),
        ConcurrencyMemory(),
        DecodeThroughput(),
        RequestLatency(),
        OutputLength(),
        AccuracyBudget(),
        EarlyFact(),
        RequestRate(),
        TraceReplay(),
        ModelSize(),
    )
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a sweep went: points measured now, found done before, refused, failed, or left out at a time limit.

    Args:
        measured: done in this run.
        resumed: done in an earlier one.
        refused: could never run.
        failed: went wrong.
        left_out: experiment -> points that its time limit left for another run.
    """

    measured: int
    resumed: int
    refused: int
    failed: int
    left_out: dict[str, int] = field(default_factory=dict)


def find_experiments(names: Sequence[str]) -> list[Experiment]:
    """Return the experiments of these names, each once; all of them if none is given.

    Raises:
        UnknownNameError: a name does not exist.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise unknown_name("experiment", name, EXPERIMENTS)
    return [EXPERIMENTS[name] for name in dict.fromkeys(names or EXPERIMENTS)]


def check_sweep(experiments: Sequence[Experiment], settings: Settings) -> None:
    """Find out what could never run before a model is loaded or a file is made.

    Raises:
        ConfigError: the dtype, device, a time limit, a task or an arrival process is unknown, or nothing is left to
            measure.
        UnsupportedError: the device is absent.
        CapacityError: the machine has less memory than ``kv_memory`` or ``host_memory``.
        TraceError: a trace cannot be read.
        CheckpointError: a model does not exist.
    """
    resolve_dtype(settings.dtype, settings.device)
    check_kv_memory(parse_bytes(settings.kv_memory), torch.device(settings.device))
    check_host_memory(parse_tier_bytes(settings.host_memory))
    for entry in settings.time_limits:
        name, equals, _ = entry.rpartition("=")
        if equals:
            find_experiments([name.strip()])
    lab = Lab(settings)
    for experiment in experiments:
        time_limit(settings, experiment.name)
        experiment.check(settings)
        for source in experiment.sources(settings):
            lab.name(source)
    if not any(True for experiment in experiments for _ in experiment.points(settings, "any")):
        names = ", ".join(experiment.name for experiment in experiments)
        asked = ", ".join(settings.strategies)
        raise ConfigError(f"{names} has no point under {asked}; add a strategy such as 'offload(host)'")


def run_sweep(
    experiments: Sequence[Experiment], settings: Settings, store: RecordStore, command: str, console: Console
) -> Outcome:
    """Measure every point that the store does not have yet, with a progress bar.

    A point that cannot run is recorded with its reason and the sweep goes on. An experiment that has reached its time
    limit begins no further point; what it leaves out is not recorded, so that the same command goes on there. An
    interrupt leaves whole points only.
    """
    lab = Lab(settings)
    held = dict.fromkeys(source for experiment in experiments for source in _first_sources(experiment, settings))
    with console.status("loading models"):
        roles = {"quality": settings.quality_model, "speed": settings.speed_model}
        facts = {
            lab.name(source): lab.facts(lab.name(source), "quality" if source == roles["quality"] else "speed")
            for source in held
        }
    device = accelerator_name(settings.device) or settings.device
    store.begin_run(collect_manifest(command, settings.seed, device=device, models=facts))
    todo = [(experiment, _points(experiment, settings, lab)) for experiment in experiments]
    fresh = [(experiment, [point for point in points if not store.is_done(point)]) for experiment, points in todo]
    resumed = sum(len(points) for _, points in todo) - sum(len(points) for _, points in fresh)
    statuses: list[str] = []
    left_out: dict[str, int] = {}
    with Display(console, todo, fresh, settings) as display:
        for experiment, points in fresh:
            pace = display.enter(experiment)
            for point in points:
                if not pace.begin():
                    left_out[experiment.name] = pace.left
                    display.say(_cut_short(experiment, pace))
                    break
                display.start(point)
                statuses.append(_run_point(experiment, point, lab, store, display.say))
                display.finish(point, statuses[-1])
    return Outcome(
        measured=statuses.count("done"),
        resumed=resumed,
        refused=statuses.count("refused"),
        failed=statuses.count("failed"),
        left_out=left_out,
    )


def _first_sources(experiment: Experiment, settings: Settings) -> list[str | None]:
    """Return the models to load before a run begins: those that stay; the others come and go."""
    roles = (settings.quality_model, settings.speed_model)
    return [source for source in experiment.sources(settings) if source in roles]


def _points(experiment: Experiment, settings: Settings, lab: Lab) -> list[Point]:
    """Return all points of an experiment; what is named twice is measured once."""
    points = (
        conditioned(point, settings, **content)
        for source in experiment.sources(settings)
        for content in (model_params(source),)
        for point in experiment.points(settings, lab.name(source))
    )
    return list({point.key: point for point in points}.values())


def _cut_short(experiment: Experiment, pace: Pace) -> str:
    return (
        f"[yellow]left out[/] {experiment.name}: {pace.left} of {pace.total} points, the time limit of "
        f"{format_seconds(pace.limit_s)} is reached"
    )


def _run_point(experiment: Experiment, point: Point, lab: Lab, store: RecordStore, say: Callable[..., None]) -> str:
    try:
        store.note_model(point.model, lab.facts(point.model, experiment.role))
        samples = experiment.measure(point, lab)
    except (CapacityError, torch.OutOfMemoryError, MemoryError) as error:
        reason = _line(error) if isinstance(error, CapacityError) else f"out of memory: {_line(error)}"
        store.write_point(point, status="refused", reason=reason)
        say(f"[yellow]refused[/] {experiment.name} {short(point)}: {escape(reason)}")
        return "refused"
    except (KvatlasError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        store.write_point(point, status="failed", reason=reason)
        say(f"[red]failed[/] {experiment.name} {short(point)}: {escape(reason)}")
        return "failed"
    store.write_point(point, samples)
    return "done"


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def conditioned(point: Point, settings: Settings, **others: int | float | str) -> Point:
    """Return the point with everything that changes its samples, so that a resumed sweep mixes no settings.

    Args:
        point: as the experiment names it.
        settings: those in force.
        others: conditions that no setting names.
    """
    conditions: Params = {
        "dtype": settings.dtype,
        "device": settings.device,
        "linear_weights": settings.linear_weights,
        "threads": torch.get_num_threads(),
        "kv_memory_bytes": parse_bytes(settings.kv_memory),
        "host_memory_bytes": parse_tier_bytes(settings.host_memory),
        "link": link_name(settings.link),
        "max_batched_tokens": settings.max_batched_tokens,
        **machine_params(settings.device),
        **others,
    }
    own = {name: value for name, value in conditions.items() if name not in point.params}
    return point.model_copy(update={"params": point.params | own})
