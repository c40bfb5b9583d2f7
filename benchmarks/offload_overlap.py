"""How much of the moves is hidden behind compute, and how near is a decode step to its bound?

A decode step of an offloading strategy cannot be shorter than its compute, nor than its moves in one direction.
Compute is that of the same strategy where nothing runs beside it: no link, no prefetch, less the time that was waited.
Per ratio of the two, an *emulated* link is given the rate that makes it so; then the same steps run with prefetch and
without, interleaved, and the undisturbed ones among them. Hidden is what was moved, in both directions, while nobody
waited.
Without an accelerator both tiers are RAM and each move is a copy too, on a core of its own while there is one; so
compute that is slowed by the copies counts against the bound.

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

from kvatlas.core.observer import SpanKind
from kvatlas.core.timeline import Timeline
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
        enable_prefix_caching=False, isolate_failures=False,
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
    engine.observer = timeline = Timeline()
    for _ in range(options.output_tokens):
        engine.step()
    for request in list(engine.scheduler.running):
        engine.cancel(request)
    return steps_of(timeline.events)


def spent(steps: list[Step], *kinds: SpanKind) -> float:
    """Return the median time of a step that went to some kinds of events, seconds."""
    return statistics.median(sum(step.spent(kind) for kind in kinds) for step in steps)


def undisturbed(steps: list[Step]) -> float:
    """Return the median compute of steps whose moves ran while the compute thread waited, seconds."""
    return statistics.median(step.seconds - step.spent(SpanKind.WAIT) for step in steps)


def figures(steps: list[Step], compute: float) -> dict[str, float]:
    """Return medians over steps, seconds and ratios."""
    fetch, store = spent(steps, SpanKind.FETCH), spent(steps, SpanKind.STORE)
    step, wait = statistics.median(each.seconds for each in steps), spent(steps, SpanKind.WAIT)
    return {
        "step": step,
        "compute": compute,
        "fetch": fetch,
        "store": store,
        "wait": wait,
        "rehearse": spent(steps, SpanKind.SELECT),
        "ratio": max(fetch, store) / compute,
        "hidden": 1 - wait / (fetch + store),
        "bound reached": max(compute, fetch, store) / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-125m")
    parser.add_argument("--choice", default="rehearse(alpha=4.0, cap=0.2, partial=0.3)")
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
    free = decode(model, late, options, None)
    fetched = statistics.median(
        sum(event.num_bytes for event in step.events if event.kind == SpanKind.FETCH) for step in free
    )
    headings = ("link (emulated)", "prefetch", "step ms", "compute ms", "fetch ms", "store ms", "waited ms")
    table = Table(*headings, "moves/compute", "hidden", "of the bound", title=f"{options.model}, {options.choice}")
    console, results = Console(width=150), []
    console.print(
        f"{options.prompt_tokens} prompt tokens, batch {options.batch}, {options.threads} thread(s); a step fetches "
        f"{format_bytes(fetched)} and computes for {undisturbed(free) * 1e3:.1f} ms"
    )
    for ratio in options.ratios:
        rate = LinkRate(bytes_per_s=fetched / (ratio * undisturbed(free)), latency_s=10e-6)
        steps: dict[str, list[Step]] = {ahead: [], late: []}
        alone: list[Step] = []
        for _ in range(options.repeats):
            alone += decode(model, late, options, None)
            for strategy in steps:
                steps[strategy] += decode(model, strategy, options, rate)
        for strategy, found in steps.items():
            row = figures(found, undisturbed(alone))
            results.append({"strategy": strategy, "link": str(rate), "emulated": True, **row})
            milliseconds = [f"{row[name] * 1e3:.1f}" for name in ("step", "compute", "fetch", "store", "wait")]
            shares = [f"{row['ratio']:.2f}", f"{row['hidden']:.0%}", f"{row['bound reached']:.0%}"]
            table.add_row(str(rate), "yes" if strategy == ahead else "no", *milliseconds, *shares)
    console.print(table)
    print(json.dumps({"model": options.model, "time": time.strftime("%Y-%m-%d"), "results": results}))


if __name__ == "__main__":
    main()
