"""``kvatlas characterize``: run experiments into a records file, resume what an earlier run left."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvatlas.cli import study_options as opt
from kvatlas.cli.command import given, option, refuse_idle
from kvatlas.cli.options import DEFAULT_RECORDS, DEFAULT_REPORT, Plugins, Records, examples
from kvatlas.core.errors import ConfigError
from kvatlas.core.folders import missing_folders
from kvatlas.core.names import unknown_name
from kvatlas.records.opening import remove_database
from kvatlas.records.store import RecordStore
from kvatlas.strategies.plugins import load_files
from kvatlas.strategies.strategy import Strategy

if TYPE_CHECKING:
    from kvatlas.experiments.experiment import Experiment, Settings
    from kvatlas.experiments.sweep import Outcome

MOST_THREADS = 1024
_EXAMPLES = examples(
    "kvatlas characterize --preset quick",
    "kvatlas characterize prompt_length --speed-model random:llama-100m --prompt-tokens 1024,4096",
    "kvatlas characterize trace_replay --trace my.jsonl --strategy full --strategy 'h2o(heavy=0.1, recent=0.1)'",
    "kvatlas characterize --preset standard --dump-config",
    "kvatlas characterize --config study.toml",
    "kvatlas characterize --list",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("characterize", epilog=_EXAMPLES)(characterize)


# Parameters that are named like a field of Settings override it; None leaves what the file or the preset says.
def characterize(
    context: typer.Context,
    experiments: Annotated[
        list[str] | None, typer.Argument(metavar="EXPERIMENT", help="Which ones; default: all.")
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="quick (minutes), standard (an hour) or full (a GPU).")
    ] = "quick",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A study in TOML: settings, experiments, preset, records.")
    ] = None,
    dump_config: Annotated[
        bool, typer.Option("--dump-config", help="Print the study in force as TOML; run nothing.")
    ] = False,
    records: Records = DEFAULT_RECORDS,
    strategies: opt.Strategies = None,
    plugins: Plugins = None,
    repeats: opt.Repeats = None,
    seed: opt.Seed = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch; default: torch's own choice.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="List experiments and points; run nothing.")] = False,
    time_limits: opt.TimeLimits = None,
    no_time_limit: opt.NoTimeLimit = False,
    repeat_limit_s: opt.RepeatLimit = None,
    speed_model: opt.SpeedModel = None,
    quality_model: opt.QualityModel = None,
    dtype: opt.DType = None,
    device: opt.Device = None,
    linear_weights: opt.LinearWeights = None,
    kv_memory: opt.KvMemory = None,
    host_memory: opt.HostMemory = None,
    link: opt.EmulatedLink = None,
    max_batched_tokens: opt.MaxBatchedTokens = None,
    prompt_tokens: opt.PromptTokens = None,
    prompt_model: opt.PromptModel = None,
    breakdown_prompt_tokens: opt.BreakdownPromptTokens = None,
    breakdown_output_tokens: opt.BreakdownOutputTokens = None,
    breakdown_links: opt.BreakdownLinks = None,
    breakdown_model: opt.BreakdownModel = None,
    concurrency: opt.Concurrency = None,
    concurrency_prompt_tokens: opt.ConcurrencyPromptTokens = None,
    concurrency_output_tokens: opt.ConcurrencyOutputTokens = None,
    pool_tries: opt.PoolTries = None,
    output_tokens: opt.OutputTokens = None,
    output_prompt_tokens: opt.OutputPromptTokens = None,
    accuracy_tasks: opt.AccuracyTasks = None,
    accuracy_context_tokens: opt.AccuracyContextTokens = None,
    accuracy_budgets: opt.AccuracyBudgets = None,
    num_prompts: opt.NumPrompts = None,
    context_tokens: opt.ContextTokens = None,
    budgets: opt.Budgets = None,
    turns: opt.Turns = None,
    num_keys: opt.NumKeys = None,
    arrivals: opt.Arrivals = None,
    rates: opt.Rates = None,
    rate_requests: opt.RateRequests = None,
    rate_prompt_tokens: opt.RatePromptTokens = None,
    rate_output_tokens: opt.RateOutputTokens = None,
    models: opt.Models = None,
    model_prompt_tokens: opt.ModelPromptTokens = None,
    model_output_tokens: opt.ModelOutputTokens = None,
    model_batch: opt.ModelBatch = None,
    traces: opt.Traces = None,
    trace_requests: opt.TraceRequests = None,
    trace_time_scale: opt.TraceTimeScale = None,
    trace_length_scale: opt.TraceLengthScale = None,
    trace_max_prompt_tokens: opt.TraceMaxPromptTokens = None,
    slo_ttft_s: opt.SloTtft = None,
    slo_tpot_s: opt.SloTpot = None,
) -> None:
    """Measure strategies on this machine: speed, memory, and what is forgotten.

    Finished points are kept: after an interrupt, the same command continues where it was.
    """
    load_files(plugins or ())
    for strategy in strategies or ():  # a typo is found before torch is loaded
        Strategy.parse(strategy)
    from kvatlas.experiments.study import StudyFile, dump_study, read_study
    from kvatlas.experiments.sweep import check_sweep, find_experiments
    from kvatlas.models.precision import resolve_device

    study = StudyFile() if config is None else read_study(config)
    if "preset" not in given(context):
        preset = study.preset or preset
    if "records" not in given(context):
        records = Path(study.records or records)
    settings = settings_of(preset, context.params, study.changes)
    names = experiments or study.experiments
    chosen = find_experiments(names)
    _refuse_idle(context, chosen, settings)
    if dump_config:
        typer.echo(dump_study(settings, names, str(records)), nl=False)
        return
    if listing:
        _list(chosen, settings)
        return
    settings = dataclasses.replace(settings, device=resolve_device(settings.device))
    check_sweep(chosen, settings)
    if threads is not None:
        use_threads(threads)
    outcome = _run(chosen, settings, records, shlex.join(["kvatlas", *(context.obj or ["characterize"])]))
    _tell(outcome, records)


def settings_of(preset: str, values: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> Settings:
    """Return the preset with what a file says instead of its values, and what was given instead of both."""
    from kvatlas.experiments.sweep import PRESETS

    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    names = [field.name for field in dataclasses.fields(PRESETS[preset])]
    changes = dict(file or {})
    changes |= {name: values[name] for name in names if values.get(name) not in (None, [], ())}
    if values.get("no_time_limit"):
        changes["time_limits"] = ()
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return dataclasses.replace(PRESETS[preset], **changes)


def _refuse_idle(context: typer.Context, chosen: Sequence[Experiment], settings: Settings) -> None:
    """Refuse options that change nothing of what is measured, or contradict each other.

    What a file or a preset says may be meant for other experiments too, so only the command line is looked at.
    """
    from kvatlas.experiments.sweep import EXPERIMENTS

    named = ", ".join(experiment.name for experiment in chosen)
    reads = frozenset[str]().union(*(experiment.reads(settings) for experiment in chosen))
    models = [option(context, name) for name in context.params if name in reads and name.endswith(("model", "models"))]
    for field in dataclasses.fields(settings):
        if field.name not in reads:
            readers = [name for name, one in EXPERIMENTS.items() if field.name in one.reads(settings)]
            own = f", whose model is {' or '.join(models)}" if field.name.endswith(("model", "models")) else ""
            other = f", or choose {readers[0]}" if readers else ""
            refuse_idle(context, [field.name], f"it is not read by {named}{own}; leave it out{other}")
    typed = given(context)
    if "no_time_limit" in typed:
        refuse_idle(context, ["time_limits"], "--no-time-limit is given too; leave one of them out")
    for entry in settings.time_limits if "time_limits" in typed else ():
        name, equals, _ = entry.rpartition("=")
        if equals and name.strip() in EXPERIMENTS and EXPERIMENTS[name.strip()] not in chosen:
            raise ConfigError(f"--time-limit {entry!r} would do nothing: only {named} runs; leave it out")
    if "dump_config" in typed:
        refuse_idle(context, ["listing", "threads"], "--dump-config prints a study, which says neither; leave one out")
    if "listing" in typed:
        refuse_idle(context, ["records", "threads"], "--list runs nothing; leave one of them out")


def _list(experiments: Sequence[Experiment], settings: Settings) -> None:
    for experiment in experiments:
        count = sum(1 for _ in experiment.points(settings, "any")) * len(experiment.sources(settings))
        typer.echo(f"{experiment.name}: {experiment.question} ({count} points)")
    for field in dataclasses.fields(settings):
        typer.echo(f"  {field.name} = {getattr(settings, field.name)}")


def use_threads(threads: int) -> None:
    """Let torch use this many CPU threads; points name the number.

    Raises:
        ConfigError: it is below 1, or more than any machine has.
    """
    import torch

    if not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"threads={threads} is out of range; write at least 1 and at most {MOST_THREADS}")
    torch.set_num_threads(threads)


def _run(experiments: Sequence[Experiment], settings: Settings, records: Path, command: str) -> Outcome:
    from kvatlas.experiments.sweep import run_sweep

    with opened(records) as store:
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
def opened(records: Path) -> Iterator[RecordStore]:
    """Open the records file; one that is made here goes again, with its folders, if no run begins in it."""
    fresh, begun, made = not os.path.exists(records), True, missing_folders(records.absolute().parent)
    try:
        with RecordStore(records) as store:
            try:
                yield store
            finally:
                begun = bool(store.runs())
    finally:
        if fresh and not begun:
            remove_database(records.absolute(), made)


def _tell(outcome: Outcome, records: Path) -> None:
    counts = f"{outcome.measured} measured, {outcome.resumed} found done, {outcome.refused} refused"
    typer.echo(f"points: {counts}, {outcome.failed} failed; in {records}")
    if outcome.left_out:
        names = ", ".join(f"{name} {count}" for name, count in outcome.left_out.items())
        step = "the same command goes on there, --no-time-limit for --time-limit to the end"
        typer.echo(f"left out at their time limit: {names}; {step}")
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
