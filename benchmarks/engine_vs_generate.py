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


def measure(run: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def generate(model: torch.nn.Module, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=output_tokens, min_new_tokens=output_tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return out[:, longest:].tolist()


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
    results = []
    for case in CASES:
        generator = torch.Generator().manual_seed(0)
        vocabulary = loaded.adapter.shape.vocab_size
        prompts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in case.prompt_tokens]
        params = SamplingParams(max_tokens=case.output_tokens, ignore_eos=True)
        ours: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        answers: dict[str, list[list[int]]] = {}
        for repeat in range(options.repeats + 1):  # the first warms up
            mine = measure(lambda p=prompts, s=params: answers.update(  # type: ignore[misc]
                ours=[list(o.outputs[0].token_ids) for o in llm.generate(p, s)]))  # fmt: skip
            other = measure(lambda p=prompts, c=case: answers.update(  # type: ignore[misc]
                theirs=generate(plain, p, c.output_tokens)))  # fmt: skip
            if repeat:
                ours.append(mine)
                theirs.append(other)
        tokens = len(prompts) * case.output_tokens
        ratios = [[t[k] / o[k] for o, t in zip(ours, theirs, strict=True)] for k in (0, 1)]
        result = {
            "case": case.name,
            "model": options.model,
            "threads": options.threads,
            "engine_tokens_per_cpu_s": tokens / statistics.median(o[0] for o in ours),
            "generate_tokens_per_cpu_s": tokens / statistics.median(t[0] for t in theirs),
            "ratio_cpu": statistics.median(ratios[0]),
            "ratio_cpu_range": [min(ratios[0]), max(ratios[0])],
            "ratio_wall": statistics.median(ratios[1]),
            "same_requests": sum(a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True)),
        }
        results.append(result)
        table.add_row(
            case.name, f"{result['engine_tokens_per_cpu_s']:.1f}", f"{result['generate_tokens_per_cpu_s']:.1f}",
            f"{result['ratio_cpu']:.2f} ({min(ratios[0]):.2f}-{max(ratios[0]):.2f})", f"{result['ratio_wall']:.2f}",
            f"{result['same_requests']}/{len(prompts)}",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"benchmark": "engine_vs_generate", "results": results}))


if __name__ == "__main__":
    main()
