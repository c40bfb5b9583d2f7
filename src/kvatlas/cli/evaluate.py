"""``kvatlas evaluate``: tasks of lm-eval under strategies, each question's result into a records file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvatlas.cli.characterize import opened
from kvatlas.cli.options import (
    DEFAULT_RECORDS,
    DEFAULT_REPORT,
    Device,
    DType,
    HostMemory,
    KvMemory,
    LinearWeights,
    Model,
    Plugins,
    Records,
    examples,
)
from kvatlas.strategies.plugins import load_files
from kvatlas.strategies.strategy import Strategy

if TYPE_CHECKING:
    from kvatlas.evaluation.run import Outcome

_EXAMPLES = examples(
    "kvatlas evaluate --model ./my-llama --task piqa,hellaswag --limit 200 --strategy full --strategy h2o",
    "kvatlas evaluate --model ./my-llama --strategy full --strategy 'snapkv(budget=64, window=8)'",
    "kvatlas evaluate --task piqa --include ./my-tasks",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("evaluate", epilog=_EXAMPLES)(evaluate)


def evaluate(
    context: typer.Context,
    tasks: Annotated[
        str, typer.Option("--task", metavar="NAME,NAME", help="Tasks or groups of lm-eval, separated by commas.")
    ] = "piqa,hellaswag,copa,winogrande,openbookqa,boolq",
    model: Model = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option("--strategy", metavar="S", help="Strategy to compare; may be repeated. Default: full."),
    ] = None,
    plugins: Plugins = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; default: all.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Worked examples per question; default: the task's own.")] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of task files of your own, for instance on local data.")
    ] = None,
    held_back: Annotated[
        int, typer.Option(help="Last tokens of a question fed after the cut; 0 is what generation does.")
    ] = 1,
    records: Records = DEFAULT_RECORDS,
    kv_memory: KvMemory = "1GiB",
    host_memory: HostMemory = "1GiB",
    max_batched_tokens: Annotated[int, typer.Option(help="Most tokens of one step.")] = 512,
    dtype: DType = "auto",
    device: Device = "auto",
    linear_weights: LinearWeights = "auto",
    seed: Annotated[int, typer.Option(help="Of the worked examples.")] = 0,
) -> None:
    """Ask a model the questions of lm-eval under each strategy: PIQA, HellaSwag, COPA, WinoGrande and many more.

    The cache is cut after the question; each choice is scored by what is left. Needs pip install 'kvatlas[eval]'.
    """
    load_files(plugins or ())
    for strategy in strategies or ():  # a typo is found before torch is loaded
        Strategy.parse(strategy)
    from kvatlas.evaluation.run import Evaluation, check_evaluation, evaluate as run
    from kvatlas.models.precision import resolve_device

    chosen: Any = dtype
    linears: Any = linear_weights
    evaluation = Evaluation(
        tasks=tuple(filter(None, map(str.strip, tasks.split(",")))),
        strategies=tuple(strategies or ("full",)),
        model=model,
        limit=limit,
        fewshot=fewshot,
        include=include,
        held_back=held_back,
        kv_memory=kv_memory,
        host_memory=host_memory,
        max_batched_tokens=max_batched_tokens,
        dtype=chosen,
        device=resolve_device(device),
        linear_weights=linears,
        seed=seed,
    )
    check_evaluation(evaluation)
    with opened(records) as store:
        outcomes = run(evaluation, store, shlex.join(["kvatlas", *(context.obj or ["evaluate"])]), _say)
    if all(outcome.status == "refused" for outcome in outcomes):
        typer.echo("error: every task was refused, for the reasons above; change the settings", err=True)
        raise typer.Exit(2)
    typer.echo(f"next: kvatlas report --records {shlex.quote(str(records))} --out {DEFAULT_REPORT}")


def _say(outcome: Outcome) -> None:
    typer.echo(f"{outcome.task} under {outcome.strategy}: {outcome.status}, {outcome.text}")
