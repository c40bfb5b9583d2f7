"""``kvatlas bench``: our kernels and our engine beside the best others, in one run; a table and one line of JSON."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvatlas.cli.characterize import MOST_THREADS
from kvatlas.cli.command import App, refuse_idle
from kvatlas.cli.options import Plugins, examples, whole_numbers
from kvatlas.core.errors import ConfigError
from kvatlas.core.names import unknown_name
from kvatlas.core.vocabulary import Format
from kvatlas.strategies.plugins import load_files

DEFAULT_PEERS = Path("out/peers")
DEFAULT_ENGINE_RESULTS = Path("out/bench/engine.jsonl")
_OPS = ("decode", "blocks", "columns", "linear", "layers")
_KERNEL_EXAMPLES = examples(
    "kvatlas bench kernels --quick",
    "kvatlas bench kernels --contexts 2048,8192,32768 --batch 1,8 --threads 1,2 --repeats 7",
    "kvatlas bench kernels --ops decode --formats fp16,int4 --contexts 32768 --batch 1",
    "kvatlas bench kernels --ops linear --threads 1",
)
_ENGINE_EXAMPLES = examples(
    "kvatlas bench engine --quick",
    "kvatlas bench engine --model random:llama-55m --threads 2 --repeats 3",
    "kvatlas bench engine --model random:llama-125m --peer openvino --peer generate --cases 1x8192+32,4x8192+32",
    "kvatlas bench engine --model random:llama-55m --no-peers --strategy full --strategy int8 --cases 16x256+64",
)
_OVERHEAD_EXAMPLES = examples(
    "kvatlas bench overhead",
    "kvatlas bench overhead --model random:llama-1b --batch 1 --steps 16",
    "kvatlas bench overhead --model random:llama-125m --strategy 'h2o(heavy=0.1, recent=0.1)'",
)
_Threads = Annotated[str, typer.Option(metavar="N,N", help="Compute threads, one run for each.")]
_Repeats = Annotated[int | None, typer.Option(help="Rounds; medians are shown.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Less of everything: a minute or two.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    group = App(
        help="Measure kernels and engine beside others, in one run on this machine.",
        epilog=examples("kvatlas bench kernels --quick", "kvatlas bench engine --quick", "kvatlas bench overhead"),
        no_args_is_help=True,
    )
    group.command("kernels", epilog=_KERNEL_EXAMPLES)(kernels)
    group.command("engine", epilog=_ENGINE_EXAMPLES)(engine)
    group.command("overhead", epilog=_OVERHEAD_EXAMPLES)(overhead)
    app.add_typer(group, name="bench")


def kernels(
    context: typer.Context,
    ops: Annotated[
        str, typer.Option(metavar="NAMES", help="decode, blocks, columns, linear, layers.")
    ] = "decode,blocks,columns,linear,layers",
    formats: Annotated[
        str, typer.Option(metavar="NAMES", help="Of keys and values: fp32, bf16, fp16, int8, int4, int2.")
    ] = "fp32,bf16,fp16,int8,int4,int2",
    contexts: Annotated[str | None, typer.Option(metavar="N,N", help="Tokens; multiples of 32.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N", help="Sequences.")] = None,
    threads: _Threads = "1,2",
    repeats: _Repeats = None,
    quick: _Quick = False,
) -> None:
    """Decode attention, block encoding, column sums, small linears and decoder layers, beside torch's best, in turns.

    Every form reads keys and values that no cache holds: it walks over 256 MiB before it reads a lane again. Bytes per
    second count what must be read once; the machine's own read rate and FLOP rate are measured in the same rounds.
    """
    wanted = _names(ops, _OPS, "operation")
    chosen = [Format(name) for name in _names(formats, tuple(Format), "format")]
    lengths = whole_numbers(("2048" if quick else "2048,8192,32768") if contexts is None else contexts)
    batches = whole_numbers(("1" if quick else "1,8") if batch is None else batch)
    counts = whole_numbers(threads)
    if not {"decode", "blocks"} & set(wanted):
        refuse_idle(context, ["formats"], "only the operations decode and blocks read it; leave it out")
    if "decode" not in wanted:
        refuse_idle(context, ["contexts", "batch"], "only the operation decode reads it; leave it out")
    rounds = repeats if repeats is not None else 2 if quick else 7
    _check(rounds, "repeats", 1)
    for length in lengths:
        _check(length, "contexts", 32, step=32)
    for each in batches:
        _check(each, "batch", 1)
    for count in counts:
        _check(count, "threads", 1, most=MOST_THREADS)
    from kvatlas.bench.kernels import measure_kernels
    from kvatlas.bench.machine import told_machine
    from kvatlas.bench.tables import print_json, wide_console

    console, results = wide_console(), {}
    for count in counts:
        results[str(count)] = measure_kernels(
            wanted, chosen, lengths, batches, threads=count, repeats=rounds, quick=quick, show=console.print
        )
    print_json(
        console,
        benchmark="kernels",
        machine=told_machine(_typed(context)),
        repeats=rounds,
        threads=results,
    )


def engine(
    context: typer.Context,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="random:llama-55m and the like; may be repeated.")
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="BATCHxPROMPT+STEPS, such as 4x256+64,1x1024+0; +0 measures prefill alone."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="generate, generate_batch, vllm-cpu, openvino, openvino-default-kv; may be repeated. Default: all.",
        ),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Whether others take part.")] = True,
    strategy: Annotated[
        list[str] | None, typer.Option(metavar="S", help="Of our engine; may be repeated. Default: full.")
    ] = None,
    plugins: Plugins = None,
    linear_weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of our engine: auto, off, fp32, fp16, bf16, int8; may be repeated."),
    ] = None,
    max_batched_tokens: Annotated[int | None, typer.Option(help="Of our engine: tokens of one step.")] = None,
    threads: Annotated[int, typer.Option(help="Compute threads of every engine.")] = 1,
    repeats: _Repeats = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Leave an engine out of a case that takes longer.")] = 600,
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Environments of peers, weights, logs.")
    ] = DEFAULT_PEERS,
    results: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines of all answers; what is there is not measured again.")
    ] = DEFAULT_ENGINE_RESULTS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Put the results file aside and measure all anew.")] = False,
    quick: _Quick = False,
) -> None:
    """Our engine and others on the same random weights in float32: prefill and decode, per second and CPU second.

    Engines take turns case by case. Ctrl-C loses nothing: the same command continues. A peer that is not installed is
    skipped with the command that installs it.
    """
    load_files(plugins or ())
    if not peers:
        refuse_idle(context, ["peer"], "--no-peers is given too; leave one of them out")
    rounds = repeats if repeats is not None else 1 if quick else 3
    _check(rounds, "repeats", 1)
    _check(threads, "threads", 1, most=MOST_THREADS)
    from kvatlas.bench.cases import cases_of
    from kvatlas.bench.engine import EngineBench
    from kvatlas.bench.machine import told_machine
    from kvatlas.bench.peers import PEERS, chosen, variants
    from kvatlas.bench.tables import engine_table, print_json, told_answers, wide_console

    others = chosen(peer or list(PEERS)) if peers else []
    models = model or (["random:llama-55m"] if quick else ["random:llama-55m", "random:llama-125m", "random:llama-1b"])
    wanted = {name: cases_of(cases, name, quick) for name in models}
    if fresh and results.exists():
        shutil.move(results, results.with_suffix(f".before-{results.stat().st_mtime:.0f}.jsonl"))
    console, progress = wide_console(), Console(stderr=True)
    bench = EngineBench(
        engines=[*variants(strategy or ["full"], linear_weights or [], max_batched_tokens), *others],
        threads=threads,
        repeats=rounds,
        folder=folder,
        results=results,
        timeout_s=timeout,
        tell=lambda line: progress.print(line, markup=False, highlight=False),
    )
    told = {}
    for name, each in wanted.items():
        try:
            found = bench.run(name, each)
        except KeyboardInterrupt:
            told_so = f"interrupted: {results} keeps all answers; the same command continues from there"
            progress.print(told_so, markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
        told[name] = told_answers(found)
        console.print(engine_table(name, threads, found))
    for what, reason in bench.skipped.items():
        console.print(f"skipped: {what}: {reason}", markup=False, soft_wrap=True)
    print_json(
        console,
        benchmark="engine",
        machine=told_machine(_typed(context)),
        threads=threads,
        repeats=rounds,
        models=told,
        skipped=bench.skipped,
    )


def overhead(
    context: typer.Context,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="random:llama-125m, a folder; may be repeated.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences that decode together.")] = "1,4",
    prompt_tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 256,
    steps: Annotated[int, typer.Option(help="Decode steps that count.")] = 32,
    strategy: Annotated[str, typer.Option(metavar="S", help="See 'kvatlas strategies'.")] = "full",
    plugins: Plugins = None,
    linear_weights: Annotated[
        str, typer.Option(metavar="NAME", help="Of small linears: auto, off, fp32, fp16, bf16, int8.")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
    quick: _Quick = False,
) -> None:
    """How much of a decode step is scheduling, strategy and Python, by part; the rest is the model and kernels."""
    load_files(plugins or ())
    batches = whole_numbers(batch)
    _check(threads, "threads", 1, most=MOST_THREADS)
    for name, number in (("prompt_tokens", prompt_tokens), ("steps", steps), *(("batch", each) for each in batches)):
        _check(number, name, 1)
    from kvatlas.bench.machine import told_machine, torch_threads
    from kvatlas.bench.overhead import measure_overhead
    from kvatlas.bench.tables import overhead_table, print_json, wide_console
    from kvatlas.models.loading import load_model

    found: list[dict[str, Any]] = []
    with torch_threads(threads):
        for name in model or (["random:llama-125m"] if quick else ["random:llama-125m", "random:llama-1b"]):
            loaded = load_model(name, dtype="float32", linear_weights=linear_weights)  # type: ignore[arg-type]  # refuses others
            found += [
                measure_overhead(loaded, batch=each, prompt_tokens=prompt_tokens, steps=steps, strategy=strategy)
                for each in batches
            ]
    console = wide_console()
    console.print(overhead_table(found))
    print_json(console, benchmark="overhead", machine=told_machine(_typed(context)), threads=threads, results=found)


def _typed(context: typer.Context) -> str:
    return shlex.join(["kvatlas", *(context.obj or ["bench", str(context.info_name)])])


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise unknown_name(what, name, known)
    return names


def _check(number: int, name: str, least: int, step: int = 1, most: int | None = None) -> None:
    if number < least or number % step or (most is not None and number > most):
        multiple = f" and a multiple of {step}" if step > 1 else "" if most is None else f" and at most {most}"
        raise ConfigError(f"{name}={number} is out of range; write at least {least}{multiple}")
