"""How much of the moves is hidden behind compute, and how near is a decode step to its bound?

A decode step of an offloading strategy cannot be shorter than its compute, nor than its moves over the link. Per ratio
of the two, an *emulated* link is given the rate that makes it so; then the same steps run with prefetch and without,
interleaved. Compute is the step less the time that its thread waited; a move that nobody waits for is hidden.
Without an accelerator both tiers are RAM and each move is a copy too, on a core of its own while there is one.

    python benchmarks/offload_overlap.py --model random:llama-125m --prompt-tokens 8192 --ratios 0.5 1 1.5
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.core.timeline import EventKind
from kvatlas.core.units import format_bytes
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.offload_breakdown import Step, steps_of
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.storage.link import LinkRate

AHEAD, NOT_AHEAD = "offload(to=host, prefetch=true)", "offload(to=host, prefetch=false)"


def decode(model: LoadedModel, strategy: str, options: argparse.Namespace, rate: LinkRate | None) -> list[Step]:
    """Return the decode steps of a batch, all in a row; the first is left out, as buffers grow in it."""
    engine = Engine(
        model, kv_memory="2GiB", host_memory="4GiB", max_batched_tokens=options.chunk_tokens,
        enable_prefix_caching=False,
    )  # fmt: skip
    rng = random.Random(0)
    vocabulary = model.adapter.shape.vocab_size
    for _ in range(options.batch):
        prompt = [rng.randrange(vocabulary) for _ in range(options.prompt_tokens)]
        engine.add_request(prompt, SamplingParams(max_tokens=options.output_tokens + 2, ignore_eos=True), strategy)
    while any(request.prefill_end is not None for request in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    engine.link.fetches.rate = engine.link.stores.rate = rate  # prompts are not what is measured
    engine.step()
    engine.record_timeline()
    for _ in range(options.output_tokens):
        engine.step()
    for request in list(engine.scheduler.running):
        engine.cancel(request)
    return steps_of(engine.timeline or [])


def figures(steps: list[Step]) -> dict[str, float]:
    """Return medians over steps, seconds, bytes and ratios."""
    median = statistics.median
    waits = [step.spent(EventKind.WAIT) for step in steps]
    moves = [step.spent(EventKind.FETCH) for step in steps]
    compute = [step.seconds - wait for step, wait in zip(steps, waits, strict=True)]
    fetched = [sum(event.num_bytes for event in step.events if event.kind == EventKind.FETCH) for step in steps]
    return {
        "step": median(step.seconds for step in steps),
        "compute": median(compute),
        "transfer": median(moves),
        "wait": median(waits),
        "speculate": median(step.spent(EventKind.SPECULATE) for step in steps),
        "bytes": median(fetched),
        "ratio": median(moves) / median(compute),
        "hidden": 1 - median(waits) / median(moves),
        "bound reached": median(
            max(c, m) / step.seconds for c, m, step in zip(compute, moves, steps, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-125m")
    parser.add_argument("--choice", default="speculate(alpha=4.0, cap=0.2, partial=0.3)")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    ahead, late = (" | ".join(filter(None, (options.choice, place))) for place in (AHEAD, NOT_AHEAD))
    free = figures(decode(model, ahead, options, None))
    headings = ("link (emulated)", "prefetch", "step ms", "compute ms", "transfer ms", "waited ms", "transfer/compute")
    table = Table(*headings, "hidden", "of the bound", title=f"{options.model}, {ahead.split(' | ')[0]}")
    console, results = Console(width=150), []
    console.print(
        f"{options.prompt_tokens} prompt tokens, batch {options.batch}, {options.threads} thread(s); a step fetches "
        f"{format_bytes(free['bytes'])} and takes {free['step'] * 1e3:.1f} ms at the speed of memory"
    )
    for ratio in options.ratios:
        rate = LinkRate(bytes_per_s=free["bytes"] / (ratio * free["compute"]), latency_s=10e-6)
        steps: dict[str, list[Step]] = {ahead: [], late: []}
        for _ in range(options.repeats):
            for strategy in steps:
                steps[strategy] += decode(model, strategy, options, rate)
        for strategy, found in steps.items():
            row = figures(found)
            results.append({"strategy": strategy, "link": str(rate), "emulated": True, **row})
            milliseconds = [f"{row[name] * 1e3:.2f}" for name in ("step", "compute", "transfer", "wait")]
            shares = [f"{row['ratio']:.2f}", f"{row['hidden']:.0%}", f"{row['bound reached']:.0%}"]
            table.add_row(str(rate), "yes" if strategy == ahead else "no", *milliseconds, *shares)
    console.print(table)
    print(json.dumps({"model": options.model, "time": time.strftime("%Y-%m-%d"), "results": results}))


if __name__ == "__main__":
    main()
