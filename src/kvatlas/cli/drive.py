"""``kvatlas drive``: measure a server of others with the requests that our strategies are measured with."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvatlas.cli.characterize import opened, settings_of, use_threads
from kvatlas.cli.command import refuse_idle
from kvatlas.cli.options import DEFAULT_RECORDS, DEFAULT_REPORT, Records, examples
from kvatlas.core.errors import ConfigError, RecordsError
from kvatlas.metrics.latency import (
    RequestTimes,
    Slo,
    goodput,
    output_throughput,
    percentile,
    request_throughput,
    total_throughput,
)
from kvatlas.records.manifest import collect_manifest
from kvatlas.records.store import RecordStore

if TYPE_CHECKING:
    from kvatlas.experiments.endpoint import Endpoint
    from kvatlas.experiments.experiment import Settings
    from kvatlas.experiments.load import Arrival
    from kvatlas.experiments.peer import Served
    from kvatlas.records.schema import Facts, Point, Sample

_EXAMPLES = examples(
    "kvatlas drive http://localhost:8000 --name 'vllm 0.32.0' --vocabulary 32000 --trace mooncake-conversation",
    "kvatlas drive http://localhost:8080 --name llama.cpp --arrivals poisson --rate 2 --requests 64",
)
_SETTINGS = (
    *("trace_time_scale", "trace_length_scale", "trace_max_prompt_tokens", "rate_prompt_tokens", "rate_output_tokens"),
    *(
        "seed",
        "slo_ttft_s",
        "slo_tpot_s",
        "dtype",
        "device",
        "linear_weights",
        "kv_memory",
        "host_memory",
        "max_batched_tokens",
    ),
)
_OF_A_TRACE = ("trace_time_scale", "trace_length_scale", "trace_max_prompt_tokens")
_DRAWN = ("rate", "burstiness", "rate_prompt_tokens", "rate_output_tokens")
_USERINFO = re.compile(r"(?<=:)//[^/?#]*@")  # name and password in a URL
_LATE_S = 0.05
_OFF = 0.05
_LOAD, _SERVER, _BESIDE = "Requests", "Server", "Beside which points: what the server was started with"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("drive", epilog=_EXAMPLES)(drive)


def _option(help: str, *, name: str | None = None, panel: str | None = None, metavar: str | None = None) -> Any:
    return typer.Option(*([name] if name else []), help=help, rich_help_panel=panel, metavar=metavar)


# Those in _SETTINGS override fields of Settings; None leaves what the preset says.
def drive(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Such as http://localhost:8000.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="What tables call it, version included.")],
    preset: Annotated[str, typer.Option(metavar="NAME", help="quick or standard, as in characterize.")] = "quick",
    records: Records = DEFAULT_RECORDS,
    trace: Annotated[
        str | None, _option("azure-conv, mooncake-conversation or a file.", panel=_LOAD, metavar="NAME|FILE")
    ] = None,
    arrivals: Annotated[
        str | None, _option("poisson or 'gamma B': requests of one length, at random.", panel=_LOAD, metavar="NAME")
    ] = None,
    rate: Annotated[float, _option("Their mean rate, requests per second.", panel=_LOAD)] = 1.0,
    burstiness: Annotated[float | None, _option("Below 1 they come in bursts; 1 is Poisson.", panel=_LOAD)] = None,
    rate_prompt_tokens: Annotated[
        int | None, _option("Their prompt length.", name="--prompt-tokens", panel=_LOAD)
    ] = None,
    rate_output_tokens: Annotated[
        int | None, _option("Their output length.", name="--output-tokens", panel=_LOAD)
    ] = None,
    requests: Annotated[int | None, _option("How many.", panel=_LOAD)] = None,
    trace_time_scale: Annotated[
        float | None, _option("Factor on a trace's arrival times.", name="--time-scale", panel=_LOAD)
    ] = None,
    trace_length_scale: Annotated[
        float | None, _option("Factor on a trace's lengths.", name="--length-scale", panel=_LOAD)
    ] = None,
    trace_max_prompt_tokens: Annotated[
        int | None, _option("Longer prompts of a trace are cut.", name="--max-prompt-tokens", panel=_LOAD)
    ] = None,
    seed: Annotated[int | None, _option("Of prompts and random arrivals.", panel=_LOAD)] = None,
    slo_ttft_s: Annotated[
        float | None, _option("Goodput's limit on TTFT, seconds.", name="--slo-ttft", panel=_LOAD, metavar="S")
    ] = None,
    slo_tpot_s: Annotated[
        float | None, _option("Goodput's limit on TPOT, seconds.", name="--slo-tpot", panel=_LOAD, metavar="S")
    ] = None,
    vocabulary: Annotated[
        int | None, _option("Token ids of prompts are below it; needed where the server does not tell.", panel=_SERVER)
    ] = None,
    served_model_name: Annotated[
        str | None, _option("Its model, as it calls it; default: the first it lists.", panel=_SERVER, metavar="NAME")
    ] = None,
    api_key: Annotated[
        str | None, _option("Default: the environment's OPENAI_API_KEY.", panel=_SERVER, metavar="KEY")
    ] = None,
    timeout: Annotated[
        float, _option("A request without end by then has failed, seconds.", panel=_SERVER, metavar="S")
    ] = 600.0,
    model_name: Annotated[
        str | None, _option("What our points call this model; default: the server's name.", panel=_BESIDE)
    ] = None,
    dtype: Annotated[str | None, _option("As in characterize.", panel=_BESIDE, metavar="NAME")] = None,
    device: Annotated[str | None, _option("As in characterize.", panel=_BESIDE, metavar="NAME")] = None,
    linear_weights: Annotated[str | None, _option("As in characterize.", panel=_BESIDE, metavar="NAME")] = None,
    kv_memory: Annotated[str | None, _option("Byte budget of its cache.", panel=_BESIDE, metavar="SIZE")] = None,
    host_memory: Annotated[str | None, _option("Byte budget of its host tier.", panel=_BESIDE, metavar="SIZE")] = None,
    max_batched_tokens: Annotated[int | None, _option("Its most tokens of one step.", panel=_BESIDE)] = None,
    threads: Annotated[int | None, _option("Its CPU threads; default: torch's own choice.", panel=_BESIDE)] = None,
) -> None:
    """Send a trace or random requests to an OpenAI-compatible server and measure what users of it would wait.

    The point stands in the report beside strategies measured with the same settings.
    """
    _check(context)
    from kvatlas.experiments.endpoint import Endpoint, describe_endpoint
    from kvatlas.experiments.peer import check_lengths, peer_point
    from kvatlas.experiments.sweep import EXPERIMENTS

    experiment = EXPERIMENTS["trace_replay" if trace else "request_rate"]
    settings = _settings(preset, context.params)
    experiment.check(settings)
    key = api_key or os.environ.get("OPENAI_API_KEY")
    endpoint = Endpoint(url=url, model=served_model_name, api_key=key, timeout_s=timeout)
    if threads is not None:
        use_threads(threads)
    model = describe_endpoint(endpoint)
    point = peer_point(experiment, settings, model_name or model.name, name)
    traffic = _traffic(point, vocabulary or model.vocabulary, settings.seed)
    check_lengths(traffic, model)
    facts: Facts = {"role": "speed", "served_by": name, "served_as": model.name, "url": endpoint.base}
    command = shlex.join(["kvatlas", *_without_key(context.obj or ["drive"])])
    with opened(records) as store:
        _want_new(store, point, settings.seed)
        manifest = collect_manifest(command, settings.seed, device=settings.device, models={point.model: facts})
        served = _send(endpoint, model.name, traffic)
        _tell(served, _slo(settings), len(traffic))
        if served.unfinished:
            typer.echo(f"interrupted: {records} keeps what it had; a point needs all {len(traffic)} requests", err=True)
            raise typer.Exit(130)
        store.begin_run(manifest)
        store.write_point(point, _samples(served, settings))
    typer.echo(f"next: kvatlas report --records {shlex.quote(str(records))} --out {DEFAULT_REPORT}")
    if served.failures:
        typer.echo(f"error: {len(served.failures)} requests failed, for the reason above", err=True)
        raise typer.Exit(1)


def _without_key(typed: Sequence[str]) -> list[str]:
    """Return the command line as records may keep it."""
    secret = [index for index, text in enumerate(typed) if index and typed[index - 1] == "--api-key"]
    shown = ["..." if index in secret else text for index, text in enumerate(typed)]
    shown = ["--api-key=..." if text.startswith("--api-key=") else text for text in shown]
    return [_USERINFO.sub("//", text) for text in shown]


def _check(context: typer.Context) -> None:
    given = context.params
    if (given["trace"] is None) == (given["arrivals"] is None):
        raise ConfigError("it is not clear which requests to send; write either --trace NAME or --arrivals poisson")
    if given["trace"] is None:
        refuse_idle(context, _OF_A_TRACE, "it belongs to --trace; leave it out, or write --trace NAME for --arrivals")
    else:
        refuse_idle(context, _DRAWN, "it belongs to --arrivals; leave it out, or write --arrivals poisson for --trace")
    if not 0 < given["rate"] < float("inf"):
        raise ConfigError(f"rate={given['rate']} is out of range; write a finite number of requests per second above 0")
    if given["vocabulary"] is not None and given["vocabulary"] < 1:
        raise ConfigError(f"vocabulary={given['vocabulary']} is out of range; write at least 1")
    if given["burstiness"] is not None and given["arrivals"] not in ("poisson", "gamma"):
        raise ConfigError("--burstiness belongs to --arrivals poisson or gamma; leave one of them out")
    if not given["name"].strip():
        raise ConfigError("the name of the server is empty; write something like --name 'vllm 0.32.0'")


def _settings(preset: str, given: Mapping[str, Any]) -> Settings:
    """Return the settings under which an experiment has one point: these requests."""
    changes: dict[str, Any] = {name: given[name] for name in _SETTINGS}
    changes |= {"strategies": ["full"], "trace_requests": given["requests"], "rate_requests": given["requests"]}
    if given["trace"]:
        return settings_of(preset, changes | {"traces": [given["trace"]]})
    from kvatlas.experiments.traffic import arrivals_name

    burstiness = given["burstiness"]
    arrivals = given["arrivals"] if burstiness is None else arrivals_name(burstiness)
    return settings_of(preset, changes | {"arrivals": [arrivals], "rates": [given["rate"]]})


def _traffic(point: Point, vocabulary: int | None, seed: int) -> list[Arrival]:
    from kvatlas.experiments.traffic import drawn_traffic, trace_traffic

    if vocabulary is None:
        raise ConfigError(
            "the server does not tell how many token ids its model has; "
            "write --vocabulary N, the vocab_size of its config.json"
        )
    make = trace_traffic if point.experiment == "trace_replay" else drawn_traffic
    return make(point.params, vocabulary, seed)


def _want_new(store: RecordStore, point: Point, seed: int) -> None:
    """Find out before anything is sent whether the point could be written."""
    if store.holds(point, seed):
        raise RecordsError(
            f"{store.path} holds {point.strategy!r} with these settings and seed {seed} already; "
            "another --seed adds a repeat, another --records starts anew"
        )


def _send(endpoint: Endpoint, model: str, traffic: Sequence[Arrival]) -> Served:
    from kvatlas.experiments.peer import drive_endpoint

    columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(traffic))
        return drive_endpoint(endpoint, model, traffic, lambda: progress.advance(task))


def _slo(settings: Settings) -> Slo:
    return Slo(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)


def _tell(served: Served, slo: Slo, asked: int) -> None:
    """Print rates, a table of latencies, and what a reader must know before believing them."""
    console = Console()
    console.rule("[bold]Serving Benchmark Result", characters="=")
    console.print(_totals(served, slo, asked))
    if served.answers:
        console.print(_latencies(served.times))
    for note in _notes(served):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _totals(served: Served, slo: Slo, asked: int) -> Table:
    times, wall_s = served.times, served.wall_s
    rows = {
        "Successful requests": f"{len(times)} of {asked}",
        "Failed requests": f"{len(served.failures)}",
        "Benchmark duration (s)": f"{wall_s:.2f}",
        "Total prompt tokens": f"{sum(one.prompt_tokens for one in times)}",
        "Total output tokens": f"{sum(one.output_tokens for one in times)}",
        "Request throughput (req/s)": f"{request_throughput(times, wall_s):.2f}",
        "Output token throughput (tok/s)": f"{output_throughput(times, wall_s):.2f}",
        "Total token throughput (tok/s)": f"{total_throughput(times, wall_s):.2f}",
        f"Request goodput (req/s), {slo}": f"{goodput(times, slo, wall_s):.2f}",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _latencies(times: Sequence[RequestTimes]) -> Table:
    pooled = {
        "TTFT (ms)": [one.ttft_s for one in times],
        "TPOT (ms)": [one.tpot_s for one in times if one.tpot_s is not None],
        "ITL (ms)": [gap for one in times for gap in one.itl_s],
        "E2E (ms)": [one.e2e_s for one in times],
    }
    table = Table(box=None)
    for index, heading in enumerate(("", "mean", "median", "p90", "p99")):
        table.add_column(heading, justify="right" if index else "left")
    for name, values in pooled.items():
        if values:
            found = [sum(values) / len(values), *(percentile(values, rank) for rank in (50, 90, 99))]
            table.add_row(name, *(f"{value * 1e3:.2f}" for value in found))
    return table


def _notes(served: Served) -> list[str]:
    """Return what sets this run apart from one without blemish."""
    from kvatlas.experiments.endpoint import EXTENSIONS

    asked = sum(answer.asked_prompt_tokens for answer in served.answers)
    counted = sum(answer.times.prompt_tokens for answer in served.answers)
    dropped = [name for name in EXTENSIONS if name not in served.dialect.extensions]
    found = {
        f"{len(served.failures)} requests failed, the first with: {next(iter(served.failures), '')}": served.failures,
        f"the server refuses {', '.join(dropped)}; the run went on without": dropped,
        "the server refuses token ids; prompts went as text of about as many tokens": served.dialect.text,
        f"the server counted {counted} prompt tokens, {asked} were meant": abs(counted - asked) > _OFF * asked,
        "the server does not count tokens; each chunk of text was taken for one": not all(
            answer.counted for answer in served.answers
        ),
        f"{served.short} answers are shorter than asked for; the server ends them": served.short,
        f"a request was sent {served.late_s * 1e3:.0f} ms later than planned: this machine is busy": served.late_s
        > _LATE_S,
    }
    return [note for note, holds in found.items() if holds]


def _samples(served: Served, settings: Settings) -> list[Sample]:
    from kvatlas.experiments.peer import served_samples

    return served_samples(served, _slo(settings))
