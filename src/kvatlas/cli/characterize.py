"""``kvatlas characterize``: run experiments into a records file, resume what an earlier run left."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvatlas.cli.options import DEFAULT_RECORDS, DEFAULT_REPORT, Records, examples, fractions, whole_numbers
from kvatlas.core.errors import ConfigError
from kvatlas.core.names import unknown_name
from kvatlas.records.store import RecordStore
from kvatlas.strategies.strategy import Strategy

if TYPE_CHECKING:
    from kvatlas.experiments.experiment import Experiment, Settings
    from kvatlas.experiments.sweep import Outcome

_EXAMPLES = examples(
    "kvatlas characterize --preset quick",
    "kvatlas characterize prompt_length --speed-model random:llama-100m --prompt-tokens 1024,4096",
    "kvatlas characterize trace_replay --trace my.jsonl --strategy full --strategy 'h2o(heavy=0.1, recent=0.1)'",
    "kvatlas characterize --list",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("characterize", epilog=_EXAMPLES)(characterize)


def _option(help: str, *, name: str | None = None, panel: str | None = None, metavar: str | None = None) -> Any:
    return typer.Option(*([name] if name else []), help=help, rich_help_panel=panel, metavar=metavar)


def _numbers(help: str, panel: str) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, metavar="N,N", parser=whole_numbers)


_RUN, _LOAD, _FACT, _TRACE = "Models and memory", "prompt_length, concurrency", "early_fact", "trace_replay"


# Parameters that are named like a field of Settings override it; None leaves what the preset says.
def characterize(
    context: typer.Context,
    experiments: Annotated[
        list[str] | None, typer.Argument(metavar="EXPERIMENT", help="Which ones; default: all.")
    ] = None,
    preset: Annotated[str, typer.Option(metavar="NAME", help="quick (minutes) or standard.")] = "quick",
    records: Records = DEFAULT_RECORDS,
    strategies: Annotated[
        list[str] | None, _option("Strategy to compare; may be repeated.", name="--strategy", metavar="S")
    ] = None,
    repeats: Annotated[int | None, _option("How often a timed point is measured.")] = None,
    seed: Annotated[int | None, _option("Of prompts and sampling.")] = None,
    threads: Annotated[int | None, _option("CPU threads of torch; default: torch's own choice.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="List experiments and points; run nothing.")] = False,
    speed_model: Annotated[
        str | None, _option("Whose time and memory is measured.", panel=_RUN, metavar="NAME")
    ] = None,
    quality_model: Annotated[str | None, _option("Whose answers are judged.", panel=_RUN, metavar="NAME")] = None,
    dtype: Annotated[
        str | None, _option("Of weights: auto, float32, bfloat16 or float16.", panel=_RUN, metavar="NAME")
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda or cuda:<index>.", panel=_RUN, metavar="NAME")] = None,
    kv_memory: Annotated[
        str | None, _option("Byte budget of the cache, such as 512MiB.", panel=_RUN, metavar="SIZE")
    ] = None,
    max_batched_tokens: Annotated[int | None, _option("Most tokens of one step.", panel=_RUN)] = None,
    prompt_tokens: Annotated[Any, _numbers("Prompt lengths.", _LOAD)] = None,
    concurrency: Annotated[Any, _numbers("Numbers of requests.", _LOAD)] = None,
    concurrency_prompt_tokens: Annotated[int | None, _option("Their prompt length.", panel=_LOAD)] = None,
    concurrency_output_tokens: Annotated[int | None, _option("Their output length.", panel=_LOAD)] = None,
    context_tokens: Annotated[Any, _numbers("Context lengths.", _FACT)] = None,
    budgets: Annotated[
        Any, typer.Option(help="Kept fractions.", rich_help_panel=_FACT, metavar="F,F", parser=fractions)
    ] = None,
    num_prompts: Annotated[int | None, _option("Prompts per point.", panel=_FACT)] = None,
    num_keys: Annotated[int | None, _option("Facts per context.", panel=_FACT)] = None,
    traces: Annotated[
        list[str] | None,
        _option(
            "azure-conv, mooncake-conversation or a file; may be repeated.",
            name="--trace",
            panel=_TRACE,
            metavar="NAME|FILE",
        ),
    ] = None,
    trace_requests: Annotated[int | None, _option("Requests taken of each trace.", panel=_TRACE)] = None,
    trace_time_scale: Annotated[float | None, _option("Factor on arrival times.", panel=_TRACE)] = None,
    trace_length_scale: Annotated[float | None, _option("Factor on lengths.", panel=_TRACE)] = None,
    trace_max_prompt_tokens: Annotated[int | None, _option("Longer prompts are cut.", panel=_TRACE)] = None,
    slo_ttft_s: Annotated[
        float | None, _option("Goodput's limit on TTFT, seconds.", name="--slo-ttft", panel=_TRACE, metavar="S")
    ] = None,
    slo_tpot_s: Annotated[
        float | None, _option("Goodput's limit on TPOT, seconds.", name="--slo-tpot", panel=_TRACE, metavar="S")
    ] = None,
) -> None:
    """Measure strategies on this machine: speed, memory, and what is forgotten.

    Finished points are kept: after an interrupt, the same command continues where it was.
    """
    for strategy in strategies or ():  # a typo is found before torch is loaded
        Strategy.parse(strategy)
    settings = _settings(preset, context.params)
    from kvatlas.experiments.sweep import check_sweep, find_experiments

    chosen = find_experiments(experiments or [])
    if listing:
        _list(chosen, settings)
        return
    check_sweep(chosen, settings)
    if threads is not None:
        _use_threads(threads)
    outcome = _run(chosen, settings, records, shlex.join(["kvatlas", *(context.obj or ["characterize"])]))
    _tell(outcome, records)


def _settings(preset: str, given: Mapping[str, Any]) -> Settings:
    """Return the preset with what was given instead of its values."""
    from kvatlas.experiments.sweep import PRESETS

    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    names = [field.name for field in dataclasses.fields(PRESETS[preset])]
    changes = {name: given[name] for name in names if given.get(name) not in (None, [], ())}
    changes |= {name: tuple(value) for name, value in changes.items() if isinstance(value, list)}
    return dataclasses.replace(PRESETS[preset], **changes)


def _list(experiments: Sequence[Experiment], settings: Settings) -> None:
    for experiment in experiments:
        count = sum(1 for _ in experiment.points(settings, "any"))
        typer.echo(f"{experiment.name}: {experiment.question} ({count} points)")
    for field in dataclasses.fields(settings):
        typer.echo(f"  {field.name} = {getattr(settings, field.name)}")


def _use_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ConfigError(f"threads={threads} is out of range; write at least 1")
    torch.set_num_threads(threads)


def _run(experiments: Sequence[Experiment], settings: Settings, records: Path, command: str) -> Outcome:
    from kvatlas.experiments.sweep import run_sweep

    with _opened(records) as store:
        try:
            return run_sweep(experiments, settings, store, command, Console(stderr=True))
        except KeyboardInterrupt:
            if not store.runs():  # it was still loading models
                raise
            kept = len(store.points(status="done"))
            typer.echo(
                f"interrupted: {records} keeps {kept} finished points; the same command continues from there", err=True
            )
            raise typer.Exit(130) from None


@contextmanager
def _opened(records: Path) -> Iterator[RecordStore]:
    """Open the records file; one that is made here goes again if no run begins in it."""
    fresh, begun = not records.exists(), True
    try:
        with RecordStore(records) as store:
            try:
                yield store
            finally:
                begun = bool(store.runs())
    finally:
        if fresh and not begun:
            records.unlink(missing_ok=True)


def _tell(outcome: Outcome, records: Path) -> None:
    counts = f"{outcome.measured} measured, {outcome.resumed} found done, {outcome.refused} refused"
    typer.echo(f"points: {counts}, {outcome.failed} failed; in {records}")
    if outcome.resumed:
        typer.echo("points found done keep the repeats they were measured with; for more, name another --records file")
    if outcome.refused and not outcome.measured and not outcome.resumed:
        typer.echo("error: every point was refused, for the reasons above; change the settings", err=True)
        raise typer.Exit(2)
    typer.echo(f"next: kvatlas report --records {shlex.quote(str(records))} --out {DEFAULT_REPORT}")
    if outcome.failed:
        typer.echo(
            f"error: {outcome.failed} points failed, for the reasons above; the same command tries them again", err=True
        )
        raise typer.Exit(1)
