"""What does Quest read, and how much faster is that?

Random 2-layer Llama (32 query and 8 KV heads of 128), the first layer dense; 16,384 tokens of context, keys and values
in 16 bits, a budget of 1,024 tokens. An observer counts bytes in the calls that the engine makes: blocks handed to
decode attention, and key bounds scored; layers that read everything (`dense`) are listed apart, pages are shared by the
query heads of a KV head. Times are those of decode attention, writing the new token included, and of choosing,
CPU-seconds of one thread, medians over decode steps, full and Quest in turns.
Expected: 1/16 of the pages and bounds of 1/16 of a page's bytes: 0.125 of the bytes; time in proportion, plus a floor.

    python benchmarks/quest_bytes.py
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.core.observer import NO_SPAN, Counter, Observer, SpanKind
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import load_model
from kvatlas.strategies.strategy import Strategy

DENSE = 1


class Meter(Observer):
    """Bytes and CPU-seconds of the attention of each layer, step by step."""

    def __init__(self) -> None:
        self.layer = -1
        self.read: dict[int, list[float]] = defaultdict(list)
        self.seconds: dict[int, list[float]] = defaultdict(list)

    def span(self, kind: SpanKind, layer: int = -1, name: str = "") -> AbstractContextManager[None, None]:
        if kind is SpanKind.ATTEND:
            self.layer = layer
            self.read[layer].append(0.0)
            self.seconds[layer].append(0.0)
        if kind is SpanKind.SELECT or (kind is SpanKind.KERNEL and name == "decode_attention"):
            return self.timed()
        return NO_SPAN

    def count(self, counter: Counter, n: int | Callable[[], int]) -> None:
        if counter is Counter.READ_BYTES:
            self.read[self.layer][-1] += n() if callable(n) else n

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[self.layer][-1] += time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-wide")
    parser.add_argument("--prompt-tokens", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.model)
    strategies = ("full | fp16", f"quest(budget={options.budget}, dense={DENSE}) | fp16")
    rng = random.Random(0)
    prompt = [rng.randrange(model.adapter.shape.vocab_size) for _ in range(options.prompt_tokens)]
    runs = []
    for strategy in strategies:
        engine = Engine(model, kv_memory="1GiB", max_batched_tokens=2048, isolate_failures=False)
        request = engine.add_request(prompt, SamplingParams(max_tokens=options.steps + 1, ignore_eos=True), strategy)
        while not request.token_times_s:
            engine.step()
        runs.append((strategy, engine, Meter()))
    for _, engine, meter in runs:
        engine.observer = meter
    for _ in range(options.steps):
        for _, engine, _ in runs:
            engine.step()
    table = Table("strategy", "layers", "bytes per step", "of full", "attention ms", "of full")
    rows: list[dict[str, Any]] = []
    layers = range(len(model.adapter.shape.layers))
    for kind, chosen in (("dense", layers[:DENSE]), ("sparse", layers[DENSE:])):
        base: tuple[float, float] | None = None
        for strategy, engine, meter in runs:
            read = median(sum(step) for step in zip(*(meter.read[layer] for layer in chosen), strict=True))
            milliseconds = 1e3 * median(
                sum(step) for step in zip(*(meter.seconds[layer] for layer in chosen), strict=True)
            )
            base = base or (read, milliseconds)
            table.add_row(
                strategy, kind, f"{read / 2**20:.2f} MiB", f"{read / base[0]:.3f}", f"{milliseconds:.2f}",
                f"{milliseconds / base[1]:.2f}",
            )  # fmt: skip
            said = engine.footprint(Strategy.parse(strategy), options.prompt_tokens, options.steps + 1)
            rows.append(
                {
                    "strategy": strategy, "layers": kind, "read_bytes": read, "read_over_full": read / base[0],
                    "attention_cpu_ms": milliseconds, "time_over_full": milliseconds / base[1],
                    "footprint_read_bytes_all_layers": said.read_bytes_per_step,
                }
            )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "quest_bytes", **vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
