"""Is what a strategy saves felt in time?

Engines decode in turn, a step each per round: `full | fp16`, the same after 64 tokens, and each strategy. What
attention costs is the step of `full` less its step after 64 tokens; the promise of a strategy is that cost times the
share of bytes that it does not read, by its footprint. Given is the time saved over that promise, and how fast `full`
reads its keys and values beside the memory's own speed in the same run. Medians over rounds, 95 % intervals by
bootstrap. Expected: 0.8 and more for formats and for what cuts once, 0.65 and more for what works at every step.

SmolLM2 reads a text. The random model's prompts run without their attention, which would take hours here: what its
strategies keep is arbitrary then, how much they keep and read is not.

    python benchmarks/savings.py
    python benchmarks/savings.py --model smollm2-135m --rounds 80 --strategy 'quest(budget=512)' --threads 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvatlas.bench.machine import told_machine
from kvatlas.engine import forward
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.models import random
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.records.manifest import processor_name
from paired import turned

FULL = "full | fp16"
SHORT = 64
WIDE = random.RandomSize(layers=4, hidden=1024, intermediate=2816, query_heads=32, kv_heads=8, head_dim=128, vocab=1000)
STRATEGIES = (
    "int8",
    "kivi(bits=4)",
    "snapkv(budget=0.25) | fp16",
    "snapkv(budget=0.25) | ada | fp16",
    "snapkv(budget=0.25) | kivi(bits=4)",
    "h2o(heavy=0.125, recent=0.125) | fp16",
    "quest(budget={pages}) | fp16",
    "rocket(budget=1024) | fp16",
)


@dataclass
class Running:
    """A batch that decodes under a strategy.

    Args:
        name: the strategy.
        engine: what runs it.
        requests: of the batch.
    """

    name: str
    engine: Engine
    requests: list[Request]
    seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        start = time.perf_counter()
        self.engine.step()
        self.seconds.append(time.perf_counter() - start)

    @property
    def read_bytes(self) -> int:
        """Bytes that the last step reads of keys, values and what it chooses by."""
        return sum(request.footprint.read_bytes_per_step for request in self.requests)


@contextmanager
def no_prompt_attention() -> Iterator[None]:
    """Let prompts pass without attention: it costs the square of their length, and only decode steps are timed."""

    def nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Sequence[Any], **_: Any) -> Any:
        lse = [torch.full((q.shape[1], chunk.count), 10.0) for chunk in chunks]
        return q.new_zeros((*q.shape[:2], v.shape[-1])), lse

    def votes(
        q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, lse: Any, past: Sequence[Any], **_: Any
    ) -> Any:
        slots = [part.table.shape[-1] * part.pool.layout.block_size for part in past]
        return [torch.rand(k.shape[1], number) for number in slots], torch.rand(k.shape[1], len(k))

    with ExitStack() as stack:
        stack.enter_context(patch.object(forward, "chunk_attention", nothing))
        stack.enter_context(patch.object(forward, "column_sums", votes))
        yield


def start(model: LoadedModel, strategy: str, prompts: list[list[int]], steps: int, memory: str) -> Running:
    """Return a batch whose prompts are cached."""
    engine = Engine(model, kv_memory=memory, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=steps, ignore_eos=True)
    requests = [engine.add_request(prompt, params, strategy) for prompt in prompts]
    while any(not request.output_ids for request in requests):
        engine.step()
        for request in requests:
            if request.error is not None:
                raise request.error
    return Running(strategy, engine, requests)


def bandwidth() -> float:
    """Return the bytes per second at which this many threads read memory."""
    numbers = torch.ones(1 << 27)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / median(times)


def interval(of: Any, samples: np.ndarray) -> tuple[float, float, float]:
    """Return a statistic of rounds [rounds, k], and its 95 % interval by resampling rounds."""
    generator = np.random.default_rng(0)
    rounds = generator.integers(0, len(samples), (2000, len(samples)))
    low, high = np.percentile([of(samples[chosen]) for chosen in rounds], (2.5, 97.5))
    return float(of(samples)), float(low), float(high)


def measure(model: LoadedModel, prompts: list[list[int]], strategies: Sequence[str], options: Any) -> dict[str, Any]:
    """Return what each strategy saves of its promise."""
    steps, memory = options.rounds + 8, options.memory
    running = [start(model, FULL, prompts, steps, memory)]
    running.append(start(model, FULL, [prompt[:SHORT] for prompt in prompts], steps, memory))
    running += [start(model, strategy, prompts, steps, memory) for strategy in track(strategies, "prompts")]
    speeds = [bandwidth()]
    for number in track(range(options.rounds + 3), "rounds"):
        for each in turned(running, number):
            each.step()
    speeds.append(bandwidth())
    full, short, *others = (np.array(each.seconds[3:]) for each in running)  # the first are slower
    attention = interval(lambda x: np.median(x[:, 0] - x[:, 1]), np.stack([full, short], axis=1))
    told: dict[str, Any] = {
        "model": model.name, "tokens": len(prompts[0]), "batch": len(prompts), "full_ms": np.median(full) * 1e3,
        "attention_ms": [each * 1e3 for each in attention], "read_gb_s": running[0].read_bytes / attention[0] / 1e9,
        "memory_gb_s": median(speeds) / 1e9, "strategies": {},
    }  # fmt: skip
    for each, seconds in zip(running[2:], others, strict=True):
        share = 1 - each.read_bytes / running[0].read_bytes
        samples = np.stack([full, short, seconds], axis=1)
        paid = interval(lambda x, s=share: np.median(x[:, 0] - x[:, 2]) / (np.median(x[:, 0] - x[:, 1]) * s), samples)
        saved = interval(lambda x: np.median(x[:, 0] - x[:, 1]), samples[:, [0, 2]])
        told["strategies"][each.name] = {
            "step_ms": float(np.median(seconds) * 1e3), "saved_ms": [x * 1e3 for x in saved], "not_read": share,
            "of_promise": paid,
        }  # fmt: skip
    return told


def show(console: Console, told: dict[str, Any]) -> None:
    low, high = told["attention_ms"][1:]
    console.print(
        f"{told['model']}, batch {told['batch']} after {told['tokens']} tokens: {FULL} {told['full_ms']:.1f} ms, "
        f"attention {told['attention_ms'][0]:.1f} [{low:.1f}, {high:.1f}] ms: {told['read_gb_s']:.1f} GB/s, "
        f"{told['read_gb_s'] / told['memory_gb_s']:.0%} of the {told['memory_gb_s']:.1f} GB/s of memory"
    )
    table = Table("strategy", "ms a step", "saved, ms [95 %]", "not read", "saved over promise [95 %]")
    for name, each in told["strategies"].items():
        saved, paid = ("{:.2f} [{:.2f}, {:.2f}]".format(*each[which]) for which in ("saved_ms", "of_promise"))
        table.add_row(name, f"{each['step_ms']:.1f}", saved, f"{each['not_read']:.0%}", paid)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=["smollm2-135m", "wide"], help="default: both")
    parser.add_argument("--strategy", action="append", help="may be given more than once")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="of a prompt (default: 2,560, and 16,384 of the random model)")
    parser.add_argument("--memory", default="2GiB", help="of each strategy")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    everything = []
    console = Console(width=120)
    for name in options.model or ["smollm2-135m", "wide"]:
        with ExitStack() as stack:
            if name == "wide":
                stack.enter_context(no_prompt_attention())
                random.SIZES["llama-savings"] = WIDE
                model, tokens, pages = (
                    random.random_model("llama-savings", dtype="float32"),
                    options.tokens or 16_384,
                    1024,
                )
                prompts = [[(i * 7 + n) % WIDE.vocab for i in range(tokens)] for n in range(options.batch)]
            else:
                model, tokens, pages = load_model(name, dtype="float32"), options.tokens or 2560, 512
                ids = model.tokenizer("\n\n".join(topics[topic] for topic in sorted(topics)))["input_ids"]
                prompts = [ids[n * tokens : (n + 1) * tokens] for n in range(options.batch)]
            strategies = [each.format(pages=pages) for each in options.strategy or STRATEGIES]
            everything.append(measure(model, prompts, strategies, options))
        show(console, everything[-1])
    console.print(f"{processor_name()}, {options.threads} threads")
    if options.out:
        options.out.write_text(json.dumps({"machine": told_machine("benchmarks/savings.py"), "models": everything}))


if __name__ == "__main__":
    main()
