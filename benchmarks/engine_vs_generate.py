"""Does the engine keep up with transformers' left-padded ``generate``? Both on the same weights, in one process.

Random Llama of 100M parameters, float32, greedy, strategy ``full``. Runs are interleaved and repeated; the figure is
the median over repeats of (output tokens per CPU-second of the engine) / (of ``generate``), with wall time beside it.
Expected: at batch 1 both read the weights once per token, so the ratio shows our bookkeeping; with requests of mixed
length, ``generate`` pads every request to the longest.

    python benchmarks/engine_vs_generate.py --repeats 5
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import load_model


@dataclass(frozen=True)
class Case:
    name: str
    prompt_tokens: list[int]
    output_tokens: int


CASES = [
    Case("batch 1", [256], 64),
    Case("16 mixed requests", [128 + 32 * (7 * i % 16) for i in range(16)], 32),
]


def measure(run: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float, float]:
    """Return the answers, CPU-seconds and wall seconds of one run."""
    cpu, wall = time.process_time(), time.perf_counter()
    answers = run()
    return answers, time.process_time() - cpu, time.perf_counter() - wall


def generate(model: Any, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    lengths = {"max_new_tokens": output_tokens, "min_new_tokens": output_tokens}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
    answers: list[list[int]] = out[:, longest:].tolist()
    return answers


def engine(llm: LLM, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def compare(case: Case, llm: LLM, plain: Any, repeats: int) -> dict[str, Any]:
    """Return the figures of one case: medians over interleaved repeats, the first run being a warm-up."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = llm.engine.store.lanes.shape.vocab_size
    prompts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in case.prompt_tokens]
    runs = []
    for _ in range(repeats + 1):
        ours = measure(partial(engine, llm, prompts, case.output_tokens))
        theirs = measure(partial(generate, plain, prompts, case.output_tokens))
        runs.append((ours, theirs))
    timed, tokens = runs[1:], len(prompts) * case.output_tokens
    cpu = [theirs[1] / ours[1] for ours, theirs in timed]
    return {
        "case": case.name,
        "engine_tokens_per_cpu_s": tokens / statistics.median(ours[1] for ours, _ in timed),
        "generate_tokens_per_cpu_s": tokens / statistics.median(theirs[1] for _, theirs in timed),
        "ratio_cpu": statistics.median(cpu),
        "ratio_cpu_range": [min(cpu), max(cpu)],
        "ratio_wall": statistics.median(theirs[2] / ours[2] for ours, theirs in timed),
        "same_requests": sum(a == b for a, b in zip(runs[0][0][0], runs[0][1][0], strict=True)),
        "requests": len(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-100m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    plain = copy.deepcopy(loaded.adapter.model)
    plain.set_attn_implementation("sdpa")
    llm = LLM(loaded, kv_memory="1GiB", enable_prefix_caching=False)
    table = Table("case", "engine tok/CPU-s", "generate tok/CPU-s", "ratio CPU", "ratio wall", "same tokens")
    results = [compare(case, llm, plain, options.repeats) for case in CASES]
    for row in results:
        low, high = row["ratio_cpu_range"]
        table.add_row(
            row["case"],
            f"{row['engine_tokens_per_cpu_s']:.1f}",
            f"{row['generate_tokens_per_cpu_s']:.1f}",
            f"{row['ratio_cpu']:.2f} ({low:.2f}-{high:.2f})",
            f"{row['ratio_wall']:.2f}",
            f"{row['same_requests']}/{row['requests']}",
        )
    Console().print(table)
    facts = {"model": options.model, "threads": options.threads, "repeats": options.repeats}
    print(json.dumps({"benchmark": "engine_vs_generate", **facts, "results": results}))


if __name__ == "__main__":
    main()
