"""Does H2O hold what it says, and does that admit more requests?

Random model with head_dim 128 in bfloat16, prompts of 8K tokens.
1. Keys and values that ``h2o(heavy=0.1, recent=0.1)`` holds after the prompt, over those of ``full``; sidecars apart.
2. With memory for eight requests under ``full``: how many requests hold memory at once under either strategy.
Expected: a fifth of the bytes (rounded up to blocks), and nearly five times the requests less one prefill peak.

    python benchmarks/memory_is_real.py
"""

from __future__ import annotations

import argparse
import json
import random

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.core.units import format_bytes
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.load import Arrival, drive
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.strategies.strategy import Strategy

STRATEGIES = ("full", "h2o(heavy=0.1, recent=0.1)")


def held_after_prompt(model: LoadedModel, strategy: str, prompt_tokens: int) -> tuple[int, int]:
    """Return the bytes of keys and values, and of sidecars, of one request after its prompt."""
    engine = Engine(model, kv_memory="1GiB", max_batched_tokens=2048)
    prompt = prompts(model, prompt_tokens, 1)[0]
    request = engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True), strategy)
    while not request.token_times_s:
        engine.step()
    assert request.seq is not None
    kv_bytes, held = engine.store.kv_bytes(request.seq), engine.store.allocated_bytes(request.seq)
    books = engine.store.books()
    assert (books.used_kv, books.used) == (kv_bytes, held), "the books say something else"
    return kv_bytes, held - kv_bytes


def prompts(model: LoadedModel, prompt_tokens: int, count: int) -> list[list[int]]:
    rng = random.Random(0)
    vocabulary = model.adapter.shape.vocab_size
    return [[rng.randrange(vocabulary) for _ in range(prompt_tokens)] for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--requests", type=int, nargs=2, default=[10, 34], help="offered to full and to h2o")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("random:llama-mini", dtype="bfloat16")
    sizing = Engine(model, kv_memory="1GiB", max_batched_tokens=2048)
    one = sizing.footprint(Strategy.parse("full"), options.prompt_tokens, options.output_tokens).peak_bytes
    table = Table("strategy", "KV after prompt", "sidecars", "KV over full", "at once in 8 x full", "preemptions")
    result: dict[str, dict[str, float]] = {}
    for strategy, offered in zip(STRATEGIES, options.requests, strict=True):
        kv_bytes, sidecars = held_after_prompt(model, strategy, options.prompt_tokens)
        engine = Engine(model, kv_memory=8 * one, max_batched_tokens=2048, enable_prefix_caching=False)
        arrivals = [
            Arrival(at_s=0.0, prompt_ids=ids, output_tokens=options.output_tokens)
            for ids in prompts(model, options.prompt_tokens, offered)
        ]
        seen = drive(engine, arrivals, strategy)
        result[strategy] = {
            "kv_bytes": kv_bytes,
            "sidecar_bytes": sidecars,
            "kv_over_full": kv_bytes / result.get("full", {"kv_bytes": kv_bytes})["kv_bytes"],
            "requests_offered": offered,
            "requests_at_once": seen.peak_running,
            "preemptions": seen.preemptions,
            "pool_bytes": engine.store.arena.total_bytes,
            "peak_used_bytes": engine.peak_used_bytes,
        }
        row = result[strategy]
        table.add_row(
            strategy, format_bytes(kv_bytes), format_bytes(sidecars), f"{row['kv_over_full']:.3f}",
            str(seen.peak_running), str(seen.preemptions),
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"benchmark": "memory_is_real", "model": model.name, "dtype": "bfloat16", **result}))


if __name__ == "__main__":
    main()
