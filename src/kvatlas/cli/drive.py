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

from kvatlas.cli.characterize import opened, settings_of, use_threads
from kvatlas.cli.command import refuse_idle
from kvatlas.cli.options import DEFAULT_RECORDS, DEFAULT_REPORT, Records, examples
from kvatlas.cli.served_table import tell_served
from kvatlas.core.errors import ConfigError, RecordsError
from kvatlas.metrics.latency import Slo
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
        tell_served(served, _slo(settings), len(traffic))
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


def _samples(served: Served, settings: Settings) -> list[Sample]:
    from kvatlas.experiments.peer import served_samples

    return served_samples(served, _slo(settings))
