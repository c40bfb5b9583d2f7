"""TOVA, Knorm, Ada-KV and PyramidKV in the engine are their slow re-tellings: same logits, same kept tokens.

Budgets are per head or per layer here, so every lane may hold another number of tokens.
"""

from __future__ import annotations

from functools import cache

import pytest
from tests.driving import Job, drive, loaded, relative_error
from tests.families import tiny_model, token_ids
from tests.retold import H2O
from tests.retold_budgets import Hitters, Knorm, Tova, Votes

from kvatlas.engine import eviction
from kvatlas.engine.engine import Engine

OUTPUT_TOKENS = 9
TOLERANCE = 1e-4
LAYERS = 4
MODEL = loaded(tiny_model("llama", num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4))
DEEP = {"num_layers": LAYERS}


def snap(**options):
    return lambda n: Votes(n, 12, 4, 3, **options, **DEEP)


def share(fraction: float, prompt: int) -> int:
    return max(1, round(fraction * prompt))


TOLD = {
    "tova(budget=9)": lambda n: Tova(n, 9),
    "tova(budget=1)": lambda n: Tova(n, 1),
    "tova(budget=0.4)": lambda n: Tova(n, share(0.4, n)),
    "tova(budget=60)": lambda n: Tova(n, 60),
    "knorm(budget=12, sinks=2, recent=3)": lambda n: Knorm(n, 12, 2, 3),
    "knorm(budget=0.5, sinks=0, recent=0)": lambda n: Knorm(n, share(0.5, n), 0, 0),
    "knorm(budget=12, sinks=2, recent=3) | ada(floor=0.3)": lambda n: Knorm(n, 12, 2, 3, floor=0.3),
    "knorm(budget=12, sinks=2, recent=3) | pyramid(beta=3)": lambda n: Knorm(n, 12, 2, 3, beta=3, **DEEP),
    "snapkv(budget=12, window=4, pool=3)": snap(),
    "snapkv(budget=12, window=4, pool=3) | ada(floor=0.2)": snap(floor=0.2),
    "snapkv(budget=12, window=4, pool=3) | ada(floor=0.0)": snap(floor=0.0),
    "snapkv(budget=12, window=4, pool=3) | ada(floor=1.0)": snap(floor=1.0),
    "snapkv(budget=12, window=4, pool=3) | pyramid(beta=20)": snap(beta=20),
    "snapkv(budget=12, window=4, pool=3) | pyramid(beta=2)": snap(beta=2),
    "h2o(heavy=6, recent=5)": lambda n: Hitters(n, 6, 5),
    "h2o(heavy=6, recent=5) | ada(floor=0.2)": lambda n: Hitters(n, 6, 5, floor=0.2),
    "h2o(heavy=9, recent=4) | pyramid(beta=4)": lambda n: Hitters(n, 9, 4, beta=4, **DEEP),
}
LENGTHS = (1, 9, 37)


@cache
def tokens(length: int) -> list[int]:
    return token_ids(length + OUTPUT_TOKENS, seed=length)[0].tolist()


@cache
def told(strategy: str, prompt_tokens: int):
    return TOLD[strategy](prompt_tokens).run(MODEL.adapter, tokens(prompt_tokens)[:-1])


def job(strategy: str, prompt_tokens: int) -> Job:
    ids = tokens(prompt_tokens)
    return Job(ids[:prompt_tokens], ids[prompt_tokens:], strategy)


def assert_as_told(done: Job) -> None:
    logits, kept = told(done.strategy, len(done.prompt))
    for step in range(OUTPUT_TOKENS):
        about = f"{done.strategy}, prompt {len(done.prompt)}, step {step}"
        assert done.kept[step] == [sorted(head) for head in kept[step]], about
        assert relative_error(done.logits[step], logits[step]) < TOLERANCE, about


@pytest.mark.parametrize("strategy", TOLD)
@pytest.mark.parametrize("max_batched_tokens", [11, 512])
def test_alone(strategy: str, max_batched_tokens: int) -> None:
    for prompt_tokens in LENGTHS:
        engine = Engine(MODEL, kv_memory="2MiB", block_size=4, max_batched_tokens=max_batched_tokens)
        assert_as_told(*drive(engine, [job(strategy, prompt_tokens)]))


@pytest.mark.parametrize("tiny_tiles", [False, True])
def test_in_one_batch(tiny_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is looked at together."""
    if tiny_tiles:
        monkeypatch.setattr(eviction, "_TILE_BYTES", 1)
        monkeypatch.setattr(eviction, "_TILE_SLOTS", 1)
    jobs = [job(strategy, length) for strategy in TOLD for length in LENGTHS]
    for done in drive(Engine(MODEL, kv_memory="8MiB", block_size=3, max_batched_tokens=64), jobs):
        assert_as_told(done)


@pytest.mark.parametrize("host_memory", ["1MiB", 0])
def test_interrupted(host_memory: str | int) -> None:
    """Swapped to the host and back, or made anew: every lane holds what it would have held."""
    chosen = [strategy for strategy in TOLD if "ada" in strategy or "pyramid" in strategy or "tova" in strategy]
    jobs = [job(strategy, length) for strategy in chosen for length in (37, 9)]
    engine = Engine(MODEL, kv_memory="2MiB", host_memory=host_memory, block_size=4, max_batched_tokens=64)
    for done in drive(engine, jobs, interrupt_every=3):
        assert_as_told(done)
    assert sum(done.request.num_preemptions for done in jobs) > 3
    assert (engine.scheduler.num_swaps > 0) == bool(host_memory)


def test_heads_and_layers_really_differ() -> None:
    """Else the rest would show nothing."""
    for strategy, where in {"snapkv(budget=12, window=4, pool=3) | ada(floor=0.2)": range(4)}.items():
        done = job(strategy, 37)
        drive(Engine(MODEL, kv_memory="2MiB", block_size=4), [done])
        assert len({len(done.kept[0][lane]) for lane in where}) > 1
    done = job("snapkv(budget=12, window=4, pool=3) | pyramid(beta=20)", 37)
    drive(Engine(MODEL, kv_memory="2MiB", block_size=4), [done])
    assert [len(done.kept[0][4 * layer]) for layer in range(LAYERS)] == sorted(
        (len(done.kept[0][4 * layer]) for layer in range(LAYERS)), reverse=True
    )


def test_the_general_form_is_the_plain_one() -> None:
    """H2O told by scores is H2O as told before."""
    ids = tokens(37)[:-1]
    plain = H2O(37, 6, 5).run(MODEL.adapter, ids)[1]
    assert [[sorted(head) for head in step] for step in plain] == [
        [sorted(head) for head in step] for step in told("h2o(heavy=6, recent=5)", 37)[1]
    ]


def test_only_some_layers() -> None:
    """What is told of all layers holds of those that the stage is given to; the others keep everything."""
    done = job("tova(budget=9, layers=1-2)", 37)
    drive(Engine(MODEL, kv_memory="2MiB", block_size=4), [done])
    lengths = [len(lane) for lane in done.kept[0]]
    assert lengths == [37] * 4 + [9] * 8 + [37] * 4
