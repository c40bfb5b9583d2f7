"""Is ``--dtype auto`` the fastest of the forms there are on this processor, and what does it compute?

One engine per dtype over the same checkpoint, run in turn: prompts alone and four at once, then decode steps at batch 1
and 4 after 256 tokens. Each cell is a median over rounds; the ratio of auto to the fastest form is paired round by
round, with a 95 % interval of its geometric mean (Student's t of the logarithms). Logits of a text are compared with
those of transformers in float32.
Expected: float32 where the processor multiplies no bfloat16 numbers; auto within 3 % of the best.

    python benchmarks/dtypes.py --rounds 15
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.bench.machine import told_machine
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.engine.sampler import Sampler, sample
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.models.precision import fastest_on_cpu
from paired import T_975, mean_ratio, turned

DTYPES = ("auto", "float32", "bfloat16")
PROMPTS = {"prefill 1 x 1,024": [1024], "prefill 4 x 256": [256] * 4}
BATCHES = {"decode, batch 1": 1, "decode, batch 4": 4}
STEPS = 12


def new_engine(model: LoadedModel, sampler: Sampler = sample) -> Engine:
    return Engine(
        model, kv_memory="512MiB", max_batched_tokens=512, enable_prefix_caching=False, isolate_failures=False,
        sampler=sampler,
    )  # fmt: skip


def prefill_s(engine: Engine, lengths: list[int], rng: random.Random) -> float:
    vocabulary = engine.store.lanes.shape.vocab_size
    for length in lengths:
        engine.add_request([rng.randrange(vocabulary) for _ in range(length)], SamplingParams(max_tokens=1))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def decoding(model: LoadedModel, batch: int, steps: int) -> Engine:
    """Return an engine whose next ``steps`` steps are decode steps of ``batch`` requests."""
    engine, rng = new_engine(model), random.Random(0)
    vocabulary = engine.store.lanes.shape.vocab_size
    params = SamplingParams(max_tokens=steps + 8, ignore_eos=True)
    for _ in range(batch):
        engine.add_request([rng.randrange(vocabulary) for _ in range(256)], params)
    while engine.scheduler.waiting or any(request.prefill_end is not None for request in engine.scheduler.running):
        engine.step()
    return engine


def step_s(engine: Engine) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    return (time.perf_counter() - start) / STEPS


def measure(models: dict[str, LoadedModel], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds by cell and dtype, one per round; the order turns from round to round."""
    engines = {dtype: new_engine(model) for dtype, model in models.items()}
    taken: dict[str, dict[str, list[float]]] = {cell: {dtype: [] for dtype in models} for cell in (*PROMPTS, *BATCHES)}
    for number in range(-1, rounds):  # the first warms up
        for cell, lengths in PROMPTS.items():
            for dtype in turned(list(models), number):
                seconds = prefill_s(engines[dtype], lengths, random.Random(number))
                taken[cell][dtype] += [seconds] if number >= 0 else []
    for cell, batch in BATCHES.items():
        running = {dtype: decoding(model, batch, STEPS * (rounds + 1)) for dtype, model in models.items()}
        for number in range(-1, rounds):
            for dtype in turned(list(models), number):
                seconds = step_s(running[dtype])
                taken[cell][dtype] += [seconds] if number >= 0 else []
    return taken


def logits_error(model: LoadedModel, name: str) -> dict[str, float]:
    """Return how far the logits over a text are from transformers' own in float32."""
    from kvatlas.workloads.recall import read_filler

    assert model.tokenizer is not None
    ids = model.tokenizer(read_filler()[:4000])["input_ids"][:512]
    rows: list[torch.Tensor] = []

    def noting(logits: torch.Tensor, due: Sequence[Request], end_ids: frozenset[int]) -> list[int | Exception]:
        rows.append(logits.float().clone())
        return sample(logits, due, end_ids)

    engine = new_engine(model, noting)
    engine.add_request(ids, SamplingParams(max_tokens=1))
    engine.step()
    plain = load_model(name, dtype="float32", linear_weights="off").adapter
    plain.restore()
    with torch.inference_mode():
        wanted = plain.model(torch.tensor([ids])).logits[0, -1]
    got = rows[-1][0]
    return {
        "relative_error": float((got - wanted).norm() / wanted.norm()),
        "largest_difference": float((got - wanted).abs().max()),
        "same_token": bool(got.argmax() == wanted.argmax()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a checkpoint with a tokenizer")
    parser.add_argument("--rounds", type=int, default=15, choices=sorted(T_975))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {dtype: load_model(options.model, dtype=dtype) for dtype in DTYPES}  # type: ignore[arg-type]
    taken = measure(models, options.rounds)
    table = Table("cell", *(f"{dtype}, ms" for dtype in DTYPES), "best", "auto / best [95 %]")
    ratios = {}
    for cell, by_dtype in taken.items():
        medians = {dtype: statistics.median(seconds) for dtype, seconds in by_dtype.items()}
        best = min((dtype for dtype in DTYPES if dtype != "auto"), key=medians.__getitem__)
        ratios[cell] = mean_ratio(by_dtype["auto"], by_dtype[best])
        ratio, low, high = ratios[cell]
        shown = (f"{medians[dtype] * 1e3:.1f}" for dtype in DTYPES)
        table.add_row(cell, *shown, best, f"{ratio:.3f} [{low:.3f}, {high:.3f}]")
    Console().print(table)
    mean = math.exp(statistics.mean(math.log(ratio) for ratio, _, _ in ratios.values()))
    error = logits_error(models["auto"], options.model)
    print(f"auto is {fastest_on_cpu()}\ngeometric mean of auto over the best: {mean:.3f}")
    print(f"logits against transformers' float32: {error}")
    result = {"geometric_mean": mean, "ratios": ratios, "logits": error, "seconds": taken}
    print(json.dumps({**told_machine("benchmarks/dtypes.py"), "model": options.model, **result}))


if __name__ == "__main__":
    main()
