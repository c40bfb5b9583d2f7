"""Is prefill linear in memory: what does it take outside the pool, at a fixed chunk, as the prompt doubles?

One process per measurement: the pool is touched first, then the peak resident memory above that is read while a
prompt is processed in chunks. The C allocator is told to give large blocks back at once, so that the figure is what is
live and not what it hoards, which varies by tens of MiB from run to run. The study's H2O kept the whole attention
matrix and ran out of memory at 10-12K tokens.
Expected: no growth, since attention and its column sums run over tiles of the past.

    python benchmarks/prefill_memory.py --strategy "h2o(heavy=0.1, recent=0.1)" --prompt-tokens 16384 32768
    python benchmarks/prefill_memory.py --strategy infinigen --model random:llama-long --prompt-tokens 32768 131072
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.core.units import format_bytes
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import load_model


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match.group(1)) * 1024


def measure(options: argparse.Namespace) -> dict[str, int]:
    """Return the peak bytes outside both pools, and those inside, of one prefill in this process."""
    torch.set_num_threads(1)
    strategy, prompt_tokens, chunk_tokens = options.strategy, options.prompt_tokens[0], options.chunk_tokens
    model = load_model(options.model)
    engine = Engine(
        model,
        kv_memory="512MiB",
        host_memory="512MiB",
        max_batched_tokens=chunk_tokens,
        enable_prefix_caching=False,
        isolate_failures=False,
    )
    engine.store.arena._memory.zero_()
    assert engine.store.host is not None
    engine.store.host._memory.zero_()
    vocabulary = model.adapter.shape.vocab_size
    rng = random.Random(0)
    warm = engine.add_request([1] * 2 * chunk_tokens, SamplingParams(max_tokens=1), strategy)
    while warm.finish_reason is None:
        engine.step()
    prompt = [rng.randrange(vocabulary) for _ in range(prompt_tokens)]
    request = engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True), strategy)
    Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark
    before = resident_bytes("VmRSS")
    while not request.token_times_s:
        engine.step()
    return {
        "outside_pool_bytes": resident_bytes("VmHWM") - before,
        "pool_peak_bytes": request.peak_bytes,
        "host_peak_bytes": engine.peak_host_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="h2o(heavy=0.1, recent=0.1)")
    parser.add_argument("--model", default="random:llama-mini")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    table = Table("prompt tokens", "outside the pools, peak", "in the device pool, peak", "in the host pool, peak")
    results = {}
    for tokens in options.prompt_tokens:
        command = [sys.executable, __file__, "--one", "--strategy", options.strategy, "--prompt-tokens", str(tokens)]
        command += ["--model", options.model, "--chunk-tokens", str(options.chunk_tokens)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        results[tokens] = json.loads(output.splitlines()[-1])
        row = results[tokens]
        table.add_row(str(tokens), *map(format_bytes, row.values()))
    Console().print(table)
    print(json.dumps({"benchmark": "prefill_memory", "strategy": options.strategy, "results": results}))


if __name__ == "__main__":
    main()
