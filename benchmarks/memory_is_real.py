"""Do strategies hold what they say, and does that admit more requests?

Random model with head_dim 128 in bfloat16, prompts of 8K tokens.
1. Keys and values (scales included, sidecars apart) held once the output has begun, per token, over ``full``'s; beside
   it the arithmetic: what the formats need for that many tokens, residual windows included.
2. With memory for eight requests under ``full``: how many requests hold memory at once under each strategy.
Expected: a fifth of the bytes for H2O (rounded up to blocks), 0.51 for int8, 0.32 for 4 bits and 0.20 for 2 bits with
a residual window of 128 tokens; and as many more requests, less what a prompt needs while it is processed.

    python benchmarks/memory_is_real.py
"""

from __future__ import annotations

import argparse
import json
import random

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.core.layout import GROUP, layout_of
from kvatlas.core.units import format_bytes
from kvatlas.core.vocabulary import Format
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.load import Arrival, drive
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.strategies.strategy import Strategy

STRATEGIES = (
    "full",
    "h2o(heavy=0.1, recent=0.1)",
    "int8",
    "kivi(bits=4, residual=128)",
    "kivi(bits=2, residual=128)",
    "snapkv(budget=1024) | kivi(bits=2, residual=128)",
)
OFFERED = (10, 34, 20, 30, 44, 60)
CHUNK_TOKENS = 2048


def arithmetic(model: LoadedModel, strategy: str, prompt_tokens: int) -> float:
    """Return the bytes of keys and values that the formats need for what a strategy keeps of a prompt."""
    total = 0.0
    for layer in Strategy.parse(strategy).plan(model.adapter.shape, Format.BF16).layers:
        loose = kept = layer.limits(prompt_tokens).after_prompt or prompt_tokens
        if layer.store.old is not None:
            loose = layer.store.residual + (kept - layer.store.residual) % GROUP
        for count, stored in ((loose, layer.store.own), (kept - loose, layer.store.old)):
            if stored is not None:
                layout = layout_of(layer.shape, stored.format, GROUP)
                total += layer.shape.num_kv_heads * count * layout.kv_bytes / GROUP
    return total


def held_while_decoding(model: LoadedModel, strategy: str, prompt_tokens: int) -> tuple[int, int]:
    """Return the bytes of keys and values, and of sidecars, of one request with its second token."""
    engine = Engine(model, kv_memory="1GiB", max_batched_tokens=CHUNK_TOKENS, isolate_failures=False)
    prompt = prompts(model, prompt_tokens, 1)[0]
    request = engine.add_request(prompt, SamplingParams(max_tokens=3, ignore_eos=True), strategy)
    while len(request.token_times_s) < 2:
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
    parser.add_argument("--requests", type=int, nargs=len(OFFERED), default=OFFERED, help="offered to each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("random:llama-mini", dtype="bfloat16")
    sizing = Engine(model, kv_memory="1GiB", max_batched_tokens=CHUNK_TOKENS)
    one = sizing.footprint(Strategy.parse("full"), options.prompt_tokens, options.output_tokens).peak_bytes
    table = Table("strategy", "KV held", "of full's", "arithmetic", "sidecars", "at once in 8 x full", "preemptions")
    result: dict[str, dict[str, float]] = {}
    for strategy, offered in zip(STRATEGIES, options.requests, strict=True):
        kv_bytes, sidecars = held_while_decoding(model, strategy, options.prompt_tokens)
        needed = arithmetic(model, strategy, options.prompt_tokens)
        engine = Engine(
            model,
            kv_memory=8 * one,
            max_batched_tokens=CHUNK_TOKENS,
            enable_prefix_caching=False,
            isolate_failures=False,
        )
        arrivals = [
            Arrival(at_s=0.0, prompt_ids=ids, output_tokens=options.output_tokens)
            for ids in prompts(model, options.prompt_tokens, offered)
        ]
        seen = drive(engine, arrivals, strategy)
        result[strategy] = {
            "kv_bytes": kv_bytes,
            "sidecar_bytes": sidecars,
            "kv_over_full": kv_bytes / result.get("full", {"kv_bytes": kv_bytes})["kv_bytes"],
            "arithmetic_over_full": needed / arithmetic(model, "full", options.prompt_tokens),
            "requests_offered": offered,
            "requests_at_once": seen.peak_running,
            "preemptions": seen.preemptions,
            "pool_bytes": engine.store.arena.total_bytes,
            "peak_used_bytes": engine.peak_used_bytes,
        }
        row = result[strategy]
        table.add_row(
            strategy, format_bytes(kv_bytes), f"{row['kv_over_full']:.3f}", f"{row['arithmetic_over_full']:.3f}",
            format_bytes(sidecars), str(seen.peak_running), str(seen.preemptions),
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"benchmark": "memory_is_real", "model": model.name, "dtype": "bfloat16", **result}))


if __name__ == "__main__":
    main()
