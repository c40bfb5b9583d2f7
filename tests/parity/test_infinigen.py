"""InfiniGen in the engine is the slow re-telling of its paper: the same tokens chosen, the same logits.

Outputs are forced, so one difference does not hide behind another.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from tests.driving import Job, assert_empty, drive, loaded, relative_error
from tests.families import tiny_model, token_ids
from tests.retold import InfiniGen

from kvatlas.core.views import Selection
from kvatlas.core.vocabulary import Axis
from kvatlas.engine import beside
from kvatlas.engine.engine import Engine
from kvatlas.models.loading import LoadedModel
from kvatlas.models.rotation import rotations_of
from kvatlas.strategies.attend.rehearse import Rehearse
from kvatlas.strategies.strategy import Strategy

OUTPUT_TOKENS = 12
TOLERANCE = 1e-4
LAYERS = 4

GROUPED, SINGLE = 2, 4
"""KV heads, for four query heads."""

SPECULATIONS = [
    "rehearse(alpha=4.0, cap=0.2, partial=0.3) | offload(host)",
    "rehearse(alpha=2.0, cap=1.0, partial=0.5) | offload(host)",
    "rehearse(alpha=inf, cap=0.4, partial=1.0) | offload(host, false)",
    "rehearse(alpha=3.0, cap=0.7, partial=0.3, dense=2) | offload(host)",
]
ONE_TOKEN = "rehearse(alpha=0.0, cap=1.0, partial=0.1) | offload(host)"


@cache
def model(kv_heads: int = GROUPED) -> LoadedModel:
    return loaded(tiny_model("llama", num_hidden_layers=LAYERS, num_key_value_heads=kv_heads))


@cache
def matrices(kv_heads: int) -> list[torch.Tensor]:
    return [rotation.matrix for rotation in rotations_of(model(kv_heads))]


@cache
def tokens(length: int) -> list[int]:
    return token_ids(length + OUTPUT_TOKENS, seed=length)[0].tolist()


def job(strategy: str, prompt_tokens: int) -> Job:
    ids = tokens(prompt_tokens)
    return Job(ids[:prompt_tokens], ids[prompt_tokens:], strategy)


@cache
def told(strategy: str, prompt_tokens: int, kv_heads: int = GROUPED) -> tuple[InfiniGen, list[torch.Tensor]]:
    (attend,) = Strategy.parse(strategy).on(Axis.ATTEND)
    assert isinstance(attend, Rehearse)
    retelling = InfiniGen(
        prompt_tokens, model(kv_heads).adapter.model, matrices(kv_heads), attend.alpha, attend.cap, attend.partial,
        attend.dense,
    )  # fmt: skip
    return retelling, retelling.run(model(kv_heads).adapter, tokens(prompt_tokens)[:-1])[0]


def assert_as_told(job: Job, kv_heads: int = GROUPED) -> None:
    _, logits = told(job.strategy, len(job.prompt), kv_heads)
    assert len(job.logits) == len(logits) == OUTPUT_TOKENS
    for step, (got, wanted) in enumerate(zip(job.logits, logits, strict=True)):
        error = relative_error(got, wanted)
        assert error < TOLERANCE, f"{job.strategy}, prompt {len(job.prompt)}, step {step}: {error:.1e}"


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Selection]:
    """Return the list into which every choice goes that an engine's stages make."""
    made: list[Selection] = []
    select = Rehearse.select

    def noting(*args) -> Selection:
        made.append(select(*args))
        return made[-1]

    monkeypatch.setattr(Rehearse, "select", noting)
    return made


@pytest.mark.parametrize(
    ("strategy", "prompt_tokens", "chunk", "block_size", "kv_heads"),
    [
        *(
            (each, *rest)
            for each in SPECULATIONS
            for rest in ((34, 7, 5, GROUPED), (1, 8, 3, SINGLE), (9, 4, 16, SINGLE))
        ),
        *(
            pytest.param(each, *rest, marks=pytest.mark.slow)
            for each in SPECULATIONS
            for rest in ((34, 512, 4, GROUPED), (9, 4, 16, GROUPED))
        ),
        *((ONE_TOKEN, 34, 16, 4, kv_heads) for kv_heads in (SINGLE, GROUPED)),
    ],
)
def test_chooses_and_answers_as_told(
    choices: list[Selection], strategy: str, prompt_tokens: int, chunk: int, block_size: int, kv_heads: int
) -> None:
    engine = Engine(model(kv_heads), kv_memory="4MiB", block_size=block_size, max_batched_tokens=chunk)
    engine.observe_selection()
    done = job(strategy, prompt_tokens)
    drive(engine, [done])
    retelling, _ = told(strategy, prompt_tokens, kv_heads)
    taken = iter(choices)
    for step, layers in enumerate(retelling.chosen):
        for layer, heads in sorted(layers.items()):
            choice = next(taken)
            counts = choice.count_RH[0].tolist()
            got = {head: choice.index_RHn[0, head, :count].tolist() for head, count in enumerate(counts)}
            assert got == heads, f"step {step}, layer {layer}"
    assert next(taken, None) is None
    assert_as_told(done, kv_heads)
    account = engine.probe
    assert account is not None and account.count == len(retelling.recalls)
    assert account.recall == pytest.approx(sum(retelling.recalls) / account.count, abs=1e-5)
    assert account.mass == pytest.approx(sum(retelling.masses) / account.count, abs=1e-5)
    assert_empty(engine)


def test_the_retelling_has_something_to_tell() -> None:
    """The numbers above bind here and there, and the guesses are neither perfect nor blind."""
    capped, counted = told(SPECULATIONS[0], 34)[0], told(SPECULATIONS[1], 34)[0]
    assert set(capped.counts) >= {7, 9} and max(capped.counts) <= 9
    assert len(set(counted.counts)) > 5, "alpha decides"
    assert set(told(ONE_TOKEN, 34, SINGLE)[0].counts) == {1}
    assert set(told(ONE_TOKEN, 34, GROUPED)[0].counts) == {2}, "each query head reads its own"
    assert all(set(layers) == {2, 3} for layers in told(SPECULATIONS[3], 34)[0].chosen)
    for retelling in (capped, counted):
        assert 0.2 < sum(retelling.recalls) / len(retelling.recalls) < 1
        assert 0.1 < sum(retelling.masses) / len(retelling.masses) < 1


@pytest.mark.parametrize(("chunk", "block_size"), [(512, 1), (11, 4), (16, 32)])
def test_together_in_one_batch(chunk: int, block_size: int) -> None:
    jobs = [job(strategy, length) for length in (34, 9) for strategy in SPECULATIONS]
    engine = Engine(model(), kv_memory="8MiB", block_size=block_size, max_batched_tokens=chunk)
    for done in drive(engine, jobs):
        assert_as_told(done)
    assert_empty(engine)


@pytest.mark.parametrize("host_memory", ["8MiB", 300_000])
def test_interrupted(host_memory: str | int) -> None:
    """Swapped out and in, or made anew by the same steps: the columns chosen once stay chosen."""
    jobs = [job(strategy, 20) for strategy in SPECULATIONS]
    engine = Engine(model(), kv_memory="4MiB", block_size=4, max_batched_tokens=16, host_memory=host_memory)
    for done in drive(engine, jobs, interrupt_every=2):
        assert_as_told(done)
    assert sum(done.request.num_preemptions for done in jobs) >= 7
    assert_empty(engine)


def test_caps_between_blocks_spoil_nobody() -> None:
    """Buffers grow when the cap passes a block's end, which is not when the keys do."""
    strategy = "rehearse(alpha=inf, cap=0.3) | offload(host)"
    jobs = [job(strategy, length) for length in (29, 30, 31)]
    drive(Engine(model(), kv_memory="4MiB", block_size=4), jobs)
    for done in jobs:
        assert_as_told(done)


def test_long_prompts_fill_the_sketch_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks that do not divide a part, and with parts smaller than a block."""
    for part, block_size in ((8, 3), (8, 5), (2, 4), (7, 7)):
        monkeypatch.setattr(beside, "_TOKENS_AT_ONCE", part)
        done = job(SPECULATIONS[0], 34)
        drive(Engine(model(), kv_memory="4MiB", block_size=block_size, max_batched_tokens=16), [done])
        assert_as_told(done)


@pytest.mark.parametrize("text", ["fp16", "bf16"])
def test_in_half_precision_it_is_near(text: str) -> None:
    strategy = f"rehearse(alpha=inf, cap=1.0) | offload(host) | {text}"
    done, plain = job(strategy, 20), job(text, 20)
    drive(Engine(model(), kv_memory="4MiB", block_size=4), [done, plain])
    for got, wanted in zip(done.logits, plain.logits, strict=True):
        assert relative_error(got, wanted) < TOLERANCE


def test_accounts_begin_at_nothing() -> None:
    engine = Engine(model(), kv_memory="1MiB")
    assert engine.probe is None
    engine.observe_selection()
    account = engine.probe
    assert account is not None and account.count == 0 and math.isnan(account.recall) and math.isnan(account.mass)
    drive(engine, [job("full", 9), job("offload(host)", 9)])
    assert account.count == 0, "nothing was guessed"
