"""Each strategy in the engine is the slow re-telling of its paper: same logits, same kept tokens.

Outputs are forced, so one difference does not hide behind another. Compared are all logits and, per layer and KV
head, the positions in the cache after every step.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from tests.driving import Job, drive, loaded, relative_error
from tests.families import VOCAB_SIZE, tiny_model, token_ids
from tests.retold import H2O, ByLayer, Retelling, SnapKV, StreamingLLM
from tests.retold_budgets import Knorm, Tova

from kvatlas.engine.engine import Engine
from kvatlas.strategies.strategy import Strategy

OUTPUT_TOKENS = 9
TOLERANCE = 1e-4

MODEL = loaded(tiny_model("llama", num_hidden_layers=2))


@cache
def tokens(length: int) -> list[int]:
    """Return a prompt of ``length`` tokens and the forced output behind it."""
    return token_ids(length + OUTPUT_TOKENS, seed=length)[0].tolist()


LAYERED = {
    "h2o(heavy=4, recent=4, layers=0)": ("h2o(heavy=4, recent=4)", "full"),
    "snapkv(budget=9, window=4, pool=3, layers=1-)": ("full", "snapkv(budget=9, window=4, pool=3)"),
    "streaming_llm(sinks=2, recent=6, layers=1)": ("full", "streaming_llm(sinks=2, recent=6)"),
    "snapkv(budget=0.4, window=3, pool=5, layers=0) | h2o(heavy=0.2, recent=0.3, layers=1-)": (
        "snapkv(budget=0.4, window=3, pool=5)",
        "h2o(heavy=0.2, recent=0.3)",
    ),
    "tova(budget=6, layers=0) | knorm(budget=12, sinks=1, recent=2, layers=1)": (
        "tova(budget=6)",
        "knorm(budget=12, sinks=1, recent=2)",
    ),
}
"""What is given to some layers -> what each layer then does."""


def retelling(strategy: str, prompt_tokens: int) -> Retelling:
    if strategy in LAYERED:
        return ByLayer(prompt_tokens, [retelling(own, prompt_tokens) for own in LAYERED[strategy]])
    if strategy == "full":
        return Retelling(prompt_tokens)
    name, *numbers = re.findall(r"^\w+|[\d.]+", strategy)
    sizes = [max(1, round(float(n) * prompt_tokens)) if "." in n else int(n) for n in numbers]
    if name == "snapkv":
        sizes[0] = max(sizes[0], sizes[1] + 1)
    if "pooling=max" in strategy:
        return SnapKV(prompt_tokens, *sizes, together=max)
    told = {"h2o": H2O, "streaming_llm": StreamingLLM, "snapkv": SnapKV, "tova": Tova, "knorm": Knorm}
    return told[name](prompt_tokens, *sizes)


@cache
def told(strategy: str, prompt_tokens: int):
    return retelling(strategy, prompt_tokens).run(MODEL.adapter, tokens(prompt_tokens)[:-1])


def job(strategy: str, prompt_tokens: int) -> Job:
    ids = tokens(prompt_tokens)
    return Job(ids[:prompt_tokens], ids[prompt_tokens:], strategy)


def assert_as_told(job: Job) -> None:
    logits, kept = told(job.strategy, len(job.prompt))
    for step in range(OUTPUT_TOKENS):
        assert job.kept[step] == kept[step], f"{job.strategy}, prompt {len(job.prompt)}, step {step}"
        error = relative_error(job.logits[step], logits[step])
        assert error < TOLERANCE, f"{job.strategy}, prompt {len(job.prompt)}, step {step}: {error:.1e}"


def test_retelling_of_full_is_the_model() -> None:
    """The re-telling itself is checked against transformers: plain Llama, one forward."""
    plain = tiny_model("llama", num_hidden_layers=2)
    ids = torch.tensor([tokens(21)[:-1]])
    with torch.no_grad():
        wanted = plain(ids).logits[0, 20:]
    logits, _ = told("full", 21)
    assert relative_error(torch.stack(logits), wanted) < 1e-5
    assert wanted.shape[1] == VOCAB_SIZE


STRATEGIES = [
    "full",
    "streaming_llm(sinks=4, recent=8)",
    "streaming_llm(sinks=0, recent=5)",
    "streaming_llm(sinks=3, recent=1)",
    "streaming_llm(sinks=2, recent=40)",
    "h2o(heavy=4, recent=4)",
    "h2o(heavy=1, recent=1)",
    "h2o(heavy=7, recent=2)",
    "h2o(heavy=20, recent=15)",
    "h2o(heavy=0.2, recent=0.3)",
    "snapkv(budget=9, window=4, pool=3)",
    "snapkv(budget=4, window=1, pool=1)",
    "snapkv(budget=0.4, window=3, pool=5)",
    "snapkv(budget=9, window=4, pool=3, pooling=max)",
    *LAYERED,
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("max_batched_tokens", [7, 16, 512])
def test_alone(strategy: str, max_batched_tokens: int) -> None:
    for prompt_tokens in (1, 7, 34):
        engine = Engine(MODEL, kv_memory="1MiB", block_size=4, max_batched_tokens=max_batched_tokens)
        assert_as_told(*drive(engine, [job(strategy, prompt_tokens)]))


@pytest.mark.parametrize("block_size", [1, 5, 32])
@pytest.mark.parametrize("max_batched_tokens", [16, 64, 512])
def test_different_strategies_in_one_batch(max_batched_tokens: int, block_size: int) -> None:
    jobs = [job(strategy, length) for strategy, length in zip(STRATEGIES * 2, [34, 7, 34, 20, 7, 20] * 6, strict=False)]
    engine = Engine(MODEL, kv_memory="4MiB", block_size=block_size, max_batched_tokens=max_batched_tokens)
    for done in drive(engine, jobs):
        assert_as_told(done)


@pytest.mark.parametrize(
    "strategy",
    ["streaming_llm(sinks=4, recent=8)", "h2o(heavy=4, recent=4)", "snapkv(budget=9, window=4, pool=3)", "full"],
)
def test_interrupted_by_others(strategy: str) -> None:
    """With memory for little more than one, requests lose their caches, and get them back as they were."""
    jobs = [job(strategy, length) for length in (7, 20, 7, 7, 20)]
    memory = "28KiB" if Strategy.parse(strategy).needs else "19KiB"  # streams take a slab of their own
    drive(Engine(MODEL, kv_memory=memory, block_size=4, max_batched_tokens=16), jobs)
    for done in jobs:
        assert_as_told(done)
    assert sum(done.request.num_preemptions for done in jobs) > 0


def test_equal_numbers_of_different_meaning_do_not_mix() -> None:
    """One token is not the whole prompt, although 1 == 1.0."""
    few, all_of_it = job("h2o(heavy=1, recent=1)", 20), job("h2o(heavy=1.0, recent=1.0)", 20)
    drive(Engine(MODEL, kv_memory="1MiB", block_size=32), [few, all_of_it])
    assert max(len(lane) for lane in few.kept[-1]) == 2
    assert min(len(lane) for lane in all_of_it.kept[-1]) == 20 + OUTPUT_TOKENS - 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wide(strategy: str) -> None:
    for max_batched_tokens in (1, 16, 33, 64, 512):
        for block_size in (1, 3, 32):
            jobs = [job(strategy, length) for length in (1, 2, 7, 20, 34, 65, 90)]
            engine = Engine(MODEL, kv_memory="8MiB", block_size=block_size, max_batched_tokens=max_batched_tokens)
            for done in drive(engine, jobs):
                assert_as_told(done)
