"""RoPE that depends on length, where a sequence passes the limit: what transformers' ``generate`` does is the truth.

Llama with longrope or dynamic NTK goes on with the keys that it has; Phi-3 and PhiMoE compute everything anew, so that
there ``generate`` agrees with a forward without a cache. Neighbours, chunks, prefixes and lost caches change nothing.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from tests.driving import Job, assert_empty, drive, loaded, relative_error
from tests.families import LONGROPE_LIMIT_TOKENS as LIMIT, tiny_config, tiny_model, token_ids
from transformers import PreTrainedModel

import kvatlas
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.scoring import ScoreJob, score
from kvatlas.models.adapter import Adapter
from kvatlas.models.loading import LoadedModel
from kvatlas.models.rope import _Reached

TOLERANCE = 1e-4
OUTPUTS = 14
PROMPTS = (3, LIMIT - 9, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 8)
LOSSY = ("streaming_llm(sinks=2, recent=9)", "h2o(heavy=0.3, recent=0.3)", "snapkv(budget=9, window=4)", "full | int8",
         "rehearse(alpha=4.0, cap=0.4, partial=0.5) | offload(host)")  # fmt: skip
RENEWING = ("phi3", "phimoe")
KEEPING = ("llama longrope", "llama dynamic")

_LONGROPE = tiny_config("phi3").rope_parameters
_SETTINGS: dict[str, dict[str, Any]] = {
    "phi3": {},
    "phimoe": {
        "num_local_experts": 2,
        "max_position_embeddings": 8 * LIMIT,
        "original_max_position_embeddings": LIMIT,
        "rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
    },
    "llama longrope": {"rope_parameters": _LONGROPE},
    "llama dynamic": {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}


def plain(kind: str) -> PreTrainedModel:
    """Return a new model: one with dynamic NTK remembers the longest sequence that it has seen."""
    return tiny_model(kind.split()[0], **copy.deepcopy(_SETTINGS[kind]))


@cache
def model(kind: str) -> LoadedModel:
    return loaded(plain(kind))


@cache
def ids(length: int, seed: int = 0) -> list[int]:
    return token_ids(length, seed=seed)[0].tolist()


def job(strategy: str, prompt_tokens: int, outputs: int = OUTPUTS) -> Job:
    text = ids(prompt_tokens + outputs, prompt_tokens)
    return Job(text[:prompt_tokens], text[prompt_tokens:], strategy)


def generated(of: PreTrainedModel, prompt: list[int], outputs: list[int]) -> torch.Tensor:
    """Return the logits [n, V] of transformers' ``generate``, led along ``outputs``."""
    text = [*prompt, *outputs]
    result = of.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=len(outputs), eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True, prefix_allowed_tokens_fn=lambda _, known: [text[len(known)]],
    )  # fmt: skip
    return torch.cat(result.logits)


def right(kind: str, prompt: Any, outputs: Any) -> torch.Tensor:
    """Return the right logits [n, V]: of ``generate``, or, where it computes anew, of each text as a whole."""
    if kind in KEEPING:
        return generated(plain(kind), list(prompt), list(outputs))
    text, own = torch.tensor([[*prompt, *outputs]]), plain(kind)
    with torch.no_grad():
        ends = range(len(prompt), len(prompt) + len(outputs))
        return torch.stack([own(text[:, :end], use_cache=False).logits[0, -1] for end in ends])


@cache
def truth(kind: str, prompt_tokens: int) -> torch.Tensor:
    done = job("full", prompt_tokens)
    return right(kind, done.prompt, done.outputs)


def assert_close(got: Any, wanted: Any, what: object) -> None:
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert relative_error(a, b) < TOLERANCE, f"{what}, output {step}"


@pytest.mark.parametrize("kind", RENEWING)
def test_the_truth_is_that_of_generate(kind: str) -> None:
    """Where a family computes anew, ``generate`` gives what the model says of each text as a whole."""
    asked = plain(kind).prepare_inputs_for_generation(
        torch.zeros(1, LIMIT + 1, dtype=torch.long), past_key_values=_Reached(LIMIT), next_sequence_length=1
    )
    if asked["input_ids"].shape[1] == 1:
        pytest.skip("this release of transformers drops the cache, and then runs the last token alone")
    for length in PROMPTS:
        done = job("full", length)
        assert_close(generated(plain(kind), list(done.prompt), list(done.outputs)), truth(kind, length), length)


@pytest.mark.parametrize(
    ("max_batched_tokens", "interrupt_every"),
    [
        pytest.param(64, None, id="whole"),
        pytest.param(7, 3, id="chunked and preempted"),
        pytest.param(7, None, id="chunked", marks=pytest.mark.slow),
        pytest.param(64, 3, id="preempted", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", [*RENEWING, *KEEPING])
def test_a_batch_is_what_generate_says(kind: str, max_batched_tokens: int, interrupt_every: int | None) -> None:
    jobs = [job("full", length) for length in PROMPTS]
    engine = Engine(model(kind), kv_memory="4MiB", block_size=4, max_batched_tokens=max_batched_tokens)
    drive(engine, jobs, interrupt_every=interrupt_every)
    for done in jobs:
        assert_close(done.logits, truth(kind, len(done.prompt)), len(done.prompt))
    assert_empty(engine)


@pytest.mark.parametrize("kind", [*RENEWING, *KEEPING])
def test_each_alone_is_what_generate_says(kind: str) -> None:
    for length in PROMPTS:
        done = job("full", length)
        drive(Engine(model(kind), kv_memory="4MiB", block_size=4, enable_prefix_caching=False), [done])
        assert_close(done.logits, truth(kind, length), length)


@pytest.mark.parametrize("kind", [*RENEWING, *KEEPING])
def test_prefixes_serve_their_own_rotation_only(kind: str) -> None:
    """Texts that begin alike, below the limit and beyond it, one after the other in one engine."""
    engine = Engine(model(kind), kv_memory="4MiB", block_size=4, max_batched_tokens=7)
    text = ids(LIMIT + 12)
    for length in (LIMIT - 3, LIMIT + 6, LIMIT - 2, LIMIT + 9, LIMIT - 4):
        done = Job(text[:length], ids(OUTPUTS, length))
        drive(engine, [done])
        assert_close(done.logits, right(kind, done.prompt, done.outputs), length)
    assert_empty(engine)


@pytest.mark.parametrize("memory", ["host", "none"])
def test_little_memory_changes_nothing(memory: str) -> None:
    """Caches are swapped to the host, or given up, before and while they would be computed anew."""
    jobs = [job("full", length, outputs=30) for length in (9, 6, 17, 5, 11)]
    options = {"host_memory": "1MiB" if memory == "host" else 0, "block_size": 4, "max_batched_tokens": 32}
    engine = Engine(model("phi3"), kv_memory="80KiB", **options)
    drive(engine, jobs)
    assert sum(done.request.num_preemptions for done in jobs) > 0
    for done in jobs:
        assert_close(done.logits, right("phi3", done.prompt, done.outputs), len(done.prompt))


# Under strategies that lose something


@pytest.mark.parametrize("strategy", LOSSY)
@pytest.mark.parametrize("kind", RENEWING)
def test_a_renewed_cache_is_that_of_one_prompt(kind: str, strategy: str) -> None:
    """Beyond the limit a request answers as if all that was known then had been its prompt, and keeps to its bounds."""
    engine = Engine(model(kind), kv_memory="4MiB", block_size=4)
    crossing = job(strategy, LIMIT - 5)
    text = [*crossing.prompt, *crossing.outputs]
    prompt = Job(text[: LIMIT + 1], text[LIMIT + 1 :], strategy)
    drive(engine, [crossing])
    drive(Engine(model(kind), kv_memory="4MiB", block_size=4), [prompt])
    assert_close(crossing.logits[6:], prompt.logits, strategy)
    assert crossing.kept[6:] == prompt.kept
    assert crossing.request.peak_bytes <= crossing.request.footprint.peak_bytes


@pytest.mark.parametrize("strategy", [*LOSSY[:3], "full"])
def test_circumstances_change_nothing(strategy: str) -> None:
    alone = {length: job(strategy, length) for length in PROMPTS}
    for done in alone.values():
        drive(Engine(model("phi3"), kv_memory="4MiB", block_size=4), [done])
    for interrupt_every in (None, 2, 5):
        jobs = [job(strategy, length) for length in PROMPTS]
        engine = Engine(model("phi3"), kv_memory="4MiB", block_size=4, max_batched_tokens=9)
        drive(engine, jobs, interrupt_every=interrupt_every)
        for done in jobs:
            assert_close(done.logits, alone[len(done.prompt)].logits, (strategy, interrupt_every))
            assert done.request.peak_bytes <= done.request.footprint.peak_bytes
        assert_empty(engine)


# Sessions, scores and attach


@pytest.mark.parametrize("taken", ["kept", "given up", "swapped"])
@pytest.mark.parametrize("strategy", ["full", LOSSY[1]])
def test_a_turn_that_passes_the_limit(strategy: str, taken: str) -> None:
    """A conversation's next turn computes the turns before anew; under ``full`` that is one long prompt."""
    llm = LLM(model("phi3"), strategy, kv_memory="4MiB", block_size=4, max_batched_tokens=6)
    with llm.session() as session:
        first = session.generate(ids(7), SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].token_ids
        if taken != "kept":
            llm.engine.scheduler._take_cache(session._request, swap=taken == "swapped")
        second = session.generate(ids(9, 1), SamplingParams(max_tokens=5, ignore_eos=True)).outputs[0].token_ids
    text = [*ids(7), *first, *ids(9, 1)]
    once = llm.generate(text, SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids
    assert len(text) > LIMIT >= 7 + 4
    assert second == once
    assert_empty(llm.engine)


@pytest.mark.parametrize("held_back", [0, 1, 7])
def test_scores_are_those_of_generate(held_back: int) -> None:
    """Context tokens that are fed as steps may pass the limit, too."""
    for length in (LIMIT - 4, LIMIT + 3):
        done = job("full", length)
        scored = score(
            Engine(model("phi3")), [ScoreJob(context=tuple(done.prompt), continuation=tuple(done.outputs))], "full",
            held_back=held_back,
        )  # fmt: skip
        logprobs = truth("phi3", length).log_softmax(-1)
        wanted = [float(row[token]) for row, token in zip(logprobs, done.outputs, strict=True)]
        assert scored[0].logprobs == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("kind", [*RENEWING, *KEEPING])
def test_attached_rows_are_what_generate_says_of_each(kind: str) -> None:
    """In a batch transformers rotates all rows for the longest; here each row is answered as if it were alone."""
    own, lengths, rows = plain(kind), (LIMIT - 9, LIMIT - 1, LIMIT + 2), []
    for length in lengths:
        ours = generated_row(own, kind, length)
        rows.append(ours)
        assert_close(ours, truth(kind, length), length)
    jobs = [job("full", length) for length in lengths]
    longest = max(lengths)
    padded = torch.tensor([[0] * (longest - len(each.prompt)) + list(each.prompt) for each in jobs])

    def allowed(row: int, known: torch.Tensor) -> list[int]:
        return [list(jobs[row].outputs)[len(known) - longest]]

    with kvatlas.attach(own, block_size=4, max_batched_tokens=7) as attachment:
        result = own.generate(
            padded, attention_mask=(padded > 0).long(), do_sample=False, max_new_tokens=OUTPUTS, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True, prefix_allowed_tokens_fn=allowed,
        )  # fmt: skip
        assert_empty(attachment.engine)
    for row, alone in enumerate(rows):
        assert_close(torch.stack(result.logits)[:, row], alone, lengths[row])


def generated_row(own: PreTrainedModel, kind: str, length: int) -> torch.Tensor:
    done = job("full", length)
    with kvatlas.attach(own, block_size=4, max_batched_tokens=7):
        return generated(own, list(done.prompt), list(done.outputs))


@pytest.mark.parametrize("strategy", LOSSY)
def test_attach_is_the_engine(strategy: str) -> None:
    own, done = plain("phi3"), job(strategy, LIMIT - 5)
    drive(Engine(model("phi3"), kv_memory="4MiB", block_size=4), [done])
    with kvatlas.attach(own, strategy, block_size=4):
        assert_close(generated(own, list(done.prompt), list(done.outputs)), done.logits, strategy)


# What the adapter says of a model


@pytest.mark.parametrize("kind", [*RENEWING, *KEEPING])
def test_where_caches_are_renewed(kind: str) -> None:
    adapter = model(kind).adapter
    expected = LIMIT + 1 if kind in RENEWING else None
    assert adapter.renewed_at(3, LIMIT + 1) == adapter.renewed_at(LIMIT, LIMIT + 30) == expected
    assert adapter.renewed_at(3, LIMIT) is None and adapter.renewed_at(LIMIT + 1, LIMIT + 30) is None


def test_dynamic_ntk_reaches_beyond_the_positions_it_names() -> None:
    assert model("llama dynamic").adapter.shape.max_positions == 4 * LIMIT
    assert model("llama longrope").adapter.shape.max_positions == 8 * LIMIT
    assert Adapter(tiny_model("llama")).shape.max_positions == 128
