"""Does memory grow outside the books when chunks have ever other sizes?

Chunks of prompts have whatever size the other requests of a step leave, so a server sees hundreds. A library that keeps
something for each shape it ever saw (oneDNN compiles a kernel of 0.6 MiB) grows without an owner.
Two measurements, each in a process of its own with both pools touched first: the resident memory that prompts of so
many different sizes add after a warm-up, and its slope over minutes of random prompts and outputs.
Expected: a few MiB, and no slope. With oneDNN's products as they come it was 650 MiB.

    python benchmarks/memory_outside.py --sizes 500
    python benchmarks/memory_outside.py --minutes 15 --model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import numpy as np
import psutil
import torch

from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import load_model

MIB = 2**20
WARM_MINUTES = 3.0  # of a soak: allocators settle
STRATEGIES = ("full", "h2o(heavy=0.1, recent=0.1)", "snapkv(budget=0.25)", "int8", "kivi(bits=4)", "offload(host)")


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / MIB


def new_engine(model_name: str, chunk_tokens: int) -> Engine:
    torch.set_num_threads(1)
    engine = Engine(
        load_model(model_name),
        kv_memory="128MiB",
        host_memory="128MiB",
        max_batched_tokens=chunk_tokens,
        enable_prefix_caching=False,
        isolate_failures=False,
    )
    engine.store.arena._memory.zero_()
    assert engine.store.host is not None
    engine.store.host._memory.zero_()
    return engine


def run(engine: Engine, rng: random.Random, prompts: list[int], outputs: int, strategies: tuple[str, ...]) -> None:
    vocabulary = engine.store.lanes.shape.vocab_size
    for number, length in enumerate(prompts):
        prompt = [rng.randrange(vocabulary) for _ in range(length)]
        params = SamplingParams(max_tokens=outputs, ignore_eos=True)
        engine.add_request(prompt, params, strategies[number % len(strategies)])
    while engine.has_work:
        engine.step()


def sizes(model: str, chunk_tokens: int, count: int) -> dict[str, float]:
    """Return the MiB that prompts of ``count`` different sizes, each one chunk, add."""
    engine, rng = new_engine(model, chunk_tokens), random.Random(0)
    run(engine, rng, [chunk_tokens, chunk_tokens // 2, 40], 2, ("full",))
    before = resident_mib()
    for size in rng.sample(range(2, chunk_tokens + 1), count):
        run(engine, rng, [size], 1, ("full",))
    return {"sizes": count, "before_mib": before, "grown_mib": resident_mib() - before}


def soak(model: str, chunk_tokens: int, minutes: float) -> dict[str, Any]:
    """Return the slope of resident memory in MiB a minute, by least squares over all but the first minutes."""
    engine, rng = new_engine(model, chunk_tokens), random.Random(0)
    start = time.perf_counter()
    times: list[float] = []
    resident: list[float] = []
    while (passed := (time.perf_counter() - start) / 60) < minutes:
        lengths = [rng.randrange(2, 2 * chunk_tokens) for _ in range(rng.randrange(1, 7))]
        run(engine, rng, lengths, rng.randrange(1, 12), STRATEGIES)
        times.append(passed)
        resident.append(resident_mib())
    kept = np.array(times) >= min(WARM_MINUTES, minutes / 3)
    slope = np.polyfit(np.array(times)[kept], np.array(resident)[kept], 1)[0]
    return {
        "minutes": minutes,
        "rounds": len(times),
        "first_mib": resident[0],
        "after_warm_up_mib": float(np.array(resident)[kept][0]),
        "last_mib": resident[-1],
        "by_minute_mib": np.interp(np.arange(0, minutes), times, resident).round(1).tolist(),
        "slope_mib_per_minute": float(slope),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-55m", help="a folder or a random model")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="step token limit")
    parser.add_argument("--sizes", type=int, default=None, help="so many different chunk sizes; default 500")
    parser.add_argument("--minutes", type=float, default=None, help="soak for so long instead")
    options = parser.parse_args()
    if options.minutes is None:
        found = sizes(options.model, options.chunk_tokens, options.sizes or 500)
        print(f"{options.model}: {found['grown_mib']:+.1f} MiB after {found['sizes']} chunk sizes")
    else:
        found = soak(options.model, options.chunk_tokens, options.minutes)
        print(f"{options.model}: {found['slope_mib_per_minute']:+.2f} MiB a minute over {options.minutes:g} minutes")
    print(json.dumps({"model": options.model, **found}))


if __name__ == "__main__":
    main()
