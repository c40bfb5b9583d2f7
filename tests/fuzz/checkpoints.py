"""Checkpoints: copies of a tiny model's folder with one or two things wrong, loaded and, where that goes well, run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from tests.fuzz.harness import Case, Harm, Target
from tests.fuzz.spoilers import SPOILERS
from tests.fuzz.workplace import LONGEST_RUN, Workplace, must

from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.engine.sampler import sample
from kvatlas.models.loading import load_model


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: a copy of the checkpoint is spoilt, loaded, and asked for a few tokens."""
    folder, marker = place.folder / "spoilt", place.folder / "executed"
    ways = rng.sample(sorted(SPOILERS), rng.choice((0, 1, 1, 1, 1, 1, 2)))
    seeds = [rng.random() for _ in ways]
    options = _options(rng)

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place.checkpoint, folder)
        source: object = folder
        for way, seed in zip(ways, seeds, strict=True):
            source = SPOILERS[way](Random(seed), folder, marker) or source
        try:
            _load_and_run(source, options)
        finally:
            if marker.exists():
                marker.unlink()
                raise Harm("code of the checkpoint was executed")

    steps = "; ".join(f"{way}(Random({seed!r}))" for way, seed in zip(ways, seeds, strict=True))
    return Case(told=f"load_model after {steps} with {options}", run=run)


def _load_and_run(source: object, options: dict[str, Any]) -> None:
    model = load_model(source, **options)  # type: ignore[arg-type]
    prompt: Any = "hi" if model.tokenizer is not None else [3, 5]
    llm = LLM(model, kv_memory="1MiB", host_memory=0)
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=3, min_tokens=2))
    must(2 <= len(output.outputs[0].token_ids) <= 3, "another number of tokens")
    finite(llm.engine, [3, 5, 7])


def finite(engine: Engine, prompt: list[int]) -> None:
    """Assert that the logits are numbers: NaN weights must not load without a word."""
    seen: list[bool] = []

    def looked(logits: torch.Tensor, due: Sequence[Request], end_ids: frozenset[int]) -> list[int | Exception]:
        seen.append(bool(torch.isfinite(logits).all()))
        return sample(logits, due, end_ids)

    engine.sampler = looked
    request = engine.add_request(prompt, SamplingParams(max_tokens=1))
    for _ in range(LONGEST_RUN):
        if request.finish_reason is not None:
            break
        engine.step()
    must(all(seen), "logits are NaN or infinite, and nothing was said")


def _options(rng: Random) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rng.random() < 0.15:
        options["dtype"] = rng.choice(("auto", "float32", "bfloat16", "float16", "int8", "", None, 3, torch.float32))
    if rng.random() < 0.1:
        options["device"] = rng.choice(
            ("cpu", "cuda", "cuda:9", "cpu:0", "meta", "tpu", "", None, 3, torch.device("cpu"))
        )
    if rng.random() < 0.1:
        options["linear_weights"] = rng.choice(("auto", "off", "fp32", "int8", "bf16", "int3", "", None, 3))
    return options


TARGET = Target(name="checkpoints", make=make)
