"""``kvatlas generate``: text from prompts under a strategy, and what its cache cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvatlas.cli.command import refuse_idle
from kvatlas.cli.options import Device, DType, HostMemory, KvMemory, LinearWeights, Link, Model, Plugins, examples
from kvatlas.cli.texts import read_text
from kvatlas.core.errors import ConfigError
from kvatlas.core.units import format_bytes, format_seconds
from kvatlas.strategies.plugins import load_files
from kvatlas.strategies.strategy import Strategy

if TYPE_CHECKING:
    from kvatlas.engine.engine import Engine
    from kvatlas.engine.request import Request

_EXAMPLES = examples(
    "kvatlas generate 'def add('",
    "kvatlas generate 'def add(' --strategy 'h2o(heavy=0.1, recent=0.1)' --max-tokens 32",
    "kvatlas generate --prompt-file notes.txt --strategy infinigen --link 16GB/s,10us",
    "kvatlas generate 'The capital of France is' --model smollm2-135m",
    "kvatlas generate --prompt-file notes.txt --model ./my-llama --kv-memory 2GiB --json",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("generate", epilog=_EXAMPLES)(generate)


def generate(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One more prompt: this file's text; - is the standard input.")
    ] = None,
    model: Model = None,
    strategy: Annotated[str, typer.Option(metavar="S", help="See 'kvatlas strategies'.")] = "full",
    plugins: Plugins = None,
    kv_memory: KvMemory = "512MiB",
    host_memory: HostMemory = "1GiB",
    link: Link = None,
    dtype: DType = "auto",
    device: Device = "auto",
    linear_weights: LinearWeights = "auto",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    min_tokens: Annotated[int, typer.Option(help="Tokens before which nothing ends the output.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends the output; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come, where there is one prompt.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Continue prompts; tokens, times and cache bytes follow on the standard error."""
    load_files(plugins or ())
    texts = _texts(prompts or [], prompt_file)
    parsed = Strategy.parse(strategy)
    from kvatlas.engine.llm import LLM
    from kvatlas.engine.params import SamplingParams
    from kvatlas.engine.request import raise_if_failed

    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if temperature == 0:
        refuse_idle(context, ["top_k", "top_p", "seed"], "the temperature is 0, which is greedy; add --temperature")
    weights = {"dtype": dtype, "device": device, "linear_weights": linear_weights}
    llm = LLM(model, parsed, kv_memory, **weights, host_memory=host_memory, link=link)
    ids = [llm.encode(text) for text in texts]
    requests = [llm.engine.add_request(prompt, params, parsed) for prompt in ids]
    live = stream and len(texts) == 1 and not as_json
    held = _run(llm.engine, requests, live)
    full = Strategy.parse("full")
    for text, request in zip(texts, requests, strict=True):
        if request.error is not None:
            continue
        alone = llm.engine.footprint(full, request.output_start, len(request.output_ids) - 1).final_bytes
        facts = _facts(request, *held[request], alone)
        if link is not None:
            facts["emulated_link"] = str(llm.engine.link.rate)
        if as_json:
            typer.echo(json.dumps({"prompt": text, "text": request.text, **facts}))
        elif live:
            typer.echo()
        else:
            typer.echo(request.text)
        if not as_json:
            typer.echo(_summary(facts), err=True)
    raise_if_failed(requests)


def _texts(prompts: Sequence[str], prompt_file: Path | None) -> list[str]:
    texts = [*prompts, *([] if prompt_file is None else [read_text(prompt_file)])]
    if not texts:
        raise ConfigError("no prompt is given; write one after 'kvatlas generate', or use --prompt-file")
    if not all(texts):
        raise ConfigError("a prompt is empty; write at least one character")
    return texts


def _run(engine: Engine, requests: Sequence[Request], live: bool) -> dict[Request, tuple[int, int]]:
    """Run to the end and return the bytes that each request that did not fail held on device and host at last."""
    held: dict[Request, tuple[int, int]] = {}
    for request in requests:
        request.held_by_session = True  # its cache outlives its last token, so that it can be measured
    try:
        while any(request.finish_reason is None for request in requests):
            for new in engine.step():
                if live:
                    typer.echo(new.text, nl=False)
                    sys.stdout.flush()
                if new.finished:
                    held[new.request] = _held(engine, new.request)
                    engine.release(new.request)
    finally:
        for request in requests:
            engine.cancel(request)
    return held


def _held(engine: Engine, request: Request) -> tuple[int, int]:
    store, seq = engine.store, request.seq
    if seq is None:
        return 0, 0
    return store.allocated_bytes(seq), 0 if store.host is None else store.allocated_bytes(seq, store.host)


def _facts(request: Request, held_bytes: int, host_bytes: int, full_bytes: int) -> dict[str, Any]:
    from kvatlas.metrics.latency import RequestTimes

    times = RequestTimes(
        arrival_s=request.arrival_s, token_times_s=tuple(request.token_times_s), prompt_tokens=request.output_start
    )
    assert request.finish_reason is not None
    return {
        "token_ids": request.output_ids,
        "finish_reason": request.finish_reason.value,
        "strategy": str(request.strategy),
        "prompt_tokens": request.output_start,
        "output_tokens": len(request.output_ids),
        "ttft_s": times.ttft_s,
        "tpot_s": times.tpot_s,
        "cache_bytes": held_bytes,
        "host_bytes": host_bytes,
        "cache_peak_bytes": request.peak_bytes,
        "cache_bytes_under_full": full_bytes,
    }


def _summary(facts: dict[str, Any]) -> str:
    tpot = "-" if facts["tpot_s"] is None else format_seconds(facts["tpot_s"])
    held, full = facts["cache_bytes"], facts["cache_bytes_under_full"]
    return (
        f"{facts['strategy']}: {facts['prompt_tokens']} + {facts['output_tokens']} tokens, "
        f"TTFT {format_seconds(facts['ttft_s'])}, TPOT {tpot}, cache {format_bytes(held)} at the end "
        f"(peak {format_bytes(facts['cache_peak_bytes'])}){_elsewhere(facts)}, full would hold {format_bytes(full)}"
    )


def _elsewhere(facts: dict[str, Any]) -> str:
    host = f" and {format_bytes(facts['host_bytes'])} on the host" if facts["host_bytes"] else ""
    return host + (f" behind an emulated link of {facts['emulated_link']}" if "emulated_link" in facts else "")
