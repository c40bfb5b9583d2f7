"""Do quantized caches still answer, and does it matter how keys are grouped?

The bundled model answers questions about facts planted in its context, prompts processed in chunks, so that all but the
last chunk reads what the cache holds. Compared with the full cache on equal prompts: int8, KIVI with 4 and 2 bits, and
*naive 2 bits*: keys and values alike, token by token and 32 channels at a time, no residual window. Nothing stores that
last format; its rounding is *emulated* on the way into a 16-bit cache and labelled so.

The model's keys may have no channels much larger than the others, which is what KIVI's grouping is for. So there is a
second model, the *rescaled* one, whose answers are the same by construction: in every KV head a few pairs of rotated
channels are made larger in the key projection and smaller by the same factor in the query projection, which leaves
every score as it was. It is synthetic, and labelled so.
Expected: int8 and 4 bits lose nothing; naive 2 bits loses most on the rescaled model, per-channel keys do not.

    python benchmarks/quantized_quality.py --n 400
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from kvatlas.engine.engine import Engine
from kvatlas.experiments.asking import Conversation, ask, planted
from kvatlas.kernels.blocks import native, torch_path
from kvatlas.kernels.pool import BlockPool
from kvatlas.metrics.statistics import paired_difference_interval, wilson_interval
from kvatlas.models.loading import LoadedModel, load_model

NAIVE = "naive 2 bits per token (emulated)"
STRATEGIES = (
    "full",
    "int8",
    "kivi(bits=4, residual=128)",
    "kivi(bits=2, residual=128)",
    "kivi(bits=2, residual=0)",
    NAIVE,
)
GROUP = 32
FACTOR, PAIRS = 16.0, 2


def naive(numbers: Tensor, levels: int = 3) -> Tensor:
    """Return each token's numbers rounded to 2 bits, 32 channels at a time, minimum and scale in float16."""
    parts = []
    for part in numbers.float().split(GROUP, dim=-1):
        low = part.amin(dim=-1, keepdim=True).half().float()
        step = ((part.amax(dim=-1, keepdim=True) - low) / levels).half().float().clamp(min=1e-8)
        parts.append(((part - low) / step).round().clamp(0, levels) * step + low)
    return torch.cat(parts, dim=-1)


@contextmanager
def emulated(strategy: str) -> Iterator[str]:
    """Yield the sentence to run; for the naive format, round what is written meanwhile."""
    if strategy != NAIVE:
        yield strategy
        return
    writes = {form: form.write_slots for form in (native, torch_path)}

    def rounding(form: ModuleType, pool: BlockPool, block: Tensor, offset: Tensor, k: Tensor, v: Tensor | None) -> None:
        writes[form](pool, block, offset, naive(k), None if v is None else naive(v))

    for form in writes:  # prompts and decode steps both end there
        form.write_slots = partial(rounding, form)
    try:
        yield "fp16"
    finally:
        for form, write in writes.items():
            form.write_slots = write


def rescale(model: LoadedModel) -> None:
    """Make ``PAIRS`` pairs of rotated key channels of every KV head ``FACTOR`` times larger, queries smaller."""
    for layer in model.adapter.model.model.layers:
        attention = layer.self_attn
        width, half = attention.head_dim, attention.head_dim // 2
        with torch.no_grad():
            for projection, factor in ((attention.k_proj, FACTOR), (attention.q_proj, 1 / FACTOR)):
                heads = projection.weight.view(-1, width, projection.weight.shape[1])
                for pair in range(PAIRS):
                    index = 1 + pair * (half // PAIRS)
                    heads[:, [index, index + half]] *= factor


def outliers(model: LoadedModel) -> float:
    """Return how much larger the largest key channel is than the median one, in root mean square over a text."""
    engine = Engine(model, kv_memory="64MiB", isolate_failures=False)
    prompt = planted(model, num_keys=1, context_tokens=512, fact_depth=None, n=1, seed=5)[0].prompt
    request = engine.add_request(prompt)
    engine.step()
    assert request.seq is not None
    ratios = []
    for group in request.seq.layout.groups:
        for lane in group.lanes.tolist():
            table = engine.store.table[request.seq.row, lane, : len(prompt) // engine.store.block_size].long()
            channels = group.blocks.pool.keys[table].flatten(0, 1).float().square().mean(dim=0).sqrt()
            ratios.append(float(channels.max() / channels.median()))
    engine.cancel(request)
    return sorted(ratios)[len(ratios) // 2]


def correct(model: LoadedModel, strategy: str, options: argparse.Namespace, num_keys: int) -> list[float]:
    prompts = planted(
        model, num_keys=num_keys, context_tokens=options.context_tokens, fact_depth=None, n=options.n, seed=17
    )
    with emulated(strategy) as sentence:
        engine = Engine(model, kv_memory="512MiB", max_batched_tokens=options.chunk_tokens, isolate_failures=False)
        talks = [Conversation(turns=(prompt.prompt,), answer=prompt.answer) for prompt in prompts]
        return [sample.value for sample in ask(engine, talks, sentence) if sample.metric == "correct"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=400, help="prompts per cell")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--num-keys", type=int, nargs="+", default=[1, 16], help="facts in the context")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "largest / median key channel", "facts", "strategy", "correct %", "against full, points")
    rows = []
    models = (("bundled", load_model(None)), ("rescaled (synthetic)", load_model(None)))
    rescale(models[1][1])
    cells = [(each, keys) for each in models for keys in options.num_keys]
    for (name, model), num_keys in track(cells, description="asking"):
        ratio, full = outliers(model), None
        for strategy in STRATEGIES:
            answers = correct(model, strategy, options, num_keys)
            full = full or answers
            share = wilson_interval(int(sum(answers)), len(answers))
            change = paired_difference_interval(answers, full)
            table.add_row(
                name, f"{ratio:.1f}", str(num_keys), strategy,
                f"{100 * share.estimate:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]",
                "" if strategy == "full"
                else f"{100 * change.estimate:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
            )  # fmt: skip
            rows.append(
                {
                    "model": name, "key_channel_ratio": ratio, "num_keys": num_keys, "strategy": strategy,
                    "n": len(answers), "correct": share.estimate, "interval": [share.low, share.high],
                    "difference": change.estimate, "difference_interval": [change.low, change.high],
                }
            )  # fmt: skip
    Console(width=150).print(table)
    print(json.dumps({"benchmark": "quantized_quality", **vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
