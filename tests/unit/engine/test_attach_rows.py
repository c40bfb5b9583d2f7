"""Rows of an attached model are requests of the engine: who runs together, what fails, what waits for memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from tests.driving import assert_empty, loaded
from tests.families import tiny_model, token_ids
from torch import Tensor
from transformers import PreTrainedModel

import kvatlas
from kvatlas.core.errors import CapacityError
from kvatlas.engine.attach import Attachment
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.runner import Batch

PROMPTS = torch.stack([*token_ids(13, 13, 13, 13, seed=3)])
PADDED = PROMPTS.masked_fill(torch.arange(13) < torch.tensor([[0], [6], [3], [1]]), 0)
OUTPUTS = 12
STRATEGIES = [
    "full", "streaming_llm(sinks=2, recent=9)", "h2o(heavy=4, recent=5)", "snapkv(budget=9, window=4) | ada", "int8",
    "offload(host)", "quest(budget=8)",
]  # fmt: skip


def answer(model: PreTrainedModel, prompts: Tensor = PADDED, outputs: int = OUTPUTS) -> Tensor:
    """Return the logits [n, B, V] of a greedy generation."""
    result = model.generate(
        prompts, attention_mask=(prompts > 0).long(), max_new_tokens=outputs, do_sample=False, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(result.logits)


@contextmanager
def attached(strategy: str = "full", **options: Any) -> Iterator[tuple[PreTrainedModel, Attachment]]:
    model = tiny_model("llama")
    given = {"kv_memory": "4MiB", "block_size": 4, **options}
    with kvatlas.attach(model, strategy, **given) as attachment:
        yield model, attachment
        assert_empty(attachment.engine)


def watched(attachment: Attachment, before: Callable[[Batch], object]) -> None:
    """Call ``before`` with each batch that the engine runs."""
    run = attachment.engine._runner.run

    def watching(batch: Batch) -> Any:
        before(batch)
        return run(batch)

    attachment.engine._runner.run = watching  # type: ignore[method-assign]


def test_rows_share_every_batch() -> None:
    shapes: list[tuple[int, int]] = []
    with attached() as (model, attachment):
        watched(attachment, lambda batch: shapes.append((len(batch.chunks), len(batch.decodes))))
        answer(model)
    assert shapes == [(4, 0)] + [(0, 4)] * (OUTPUTS - 1)


@pytest.mark.parametrize("options", [{"max_num_seqs": 3}, {"max_batched_tokens": 3}])
def test_more_rows_than_run_at_once(options: dict[str, int]) -> None:
    sizes: list[int] = []
    wanted = answer(tiny_model("llama"))
    with attached(**options) as (model, attachment):
        watched(attachment, lambda batch: sizes.append(len(batch.requests)))
        torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)
    assert max(sizes) == 3


def smallest_pool(strategy: str, outputs: int) -> int:
    """Return the bytes of the smallest pool that one row can run in alone."""
    for kib in range(2, 400, 2):
        with suppress(CapacityError):
            engine = Engine(loaded(tiny_model("llama")), kv_memory=f"{kib}KiB", block_size=4)
            engine.add_request(PROMPTS[0].tolist(), SamplingParams(max_tokens=outputs), strategy)
            return kib * 1024
    raise AssertionError(f"{strategy} fits nowhere")


@pytest.mark.parametrize("host_memory", [pytest.param("1MiB", marks=pytest.mark.slow), "40KiB"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_that_does_not_fit_finishes_in_turns(strategy: str, host_memory: str) -> None:
    """In the smallest pool, swapped to a host that takes all or computed and replayed anew: the same answers."""
    outputs = 16
    with attached(strategy) as (model, _):
        wanted = answer(model, outputs=outputs)
    sizes: list[int] = []
    pool = smallest_pool(strategy, outputs)
    with attached(strategy, kv_memory=pool, host_memory=host_memory) as (model, attachment):
        watched(attachment, lambda batch: sizes.append(len(batch.requests)))
        torch.testing.assert_close(answer(model, outputs=outputs), wanted, rtol=1e-4, atol=1e-4)
    assert min(sizes) == 1 and len(sizes) > 2 * outputs


def test_a_row_that_outgrows_the_pool_is_refused_and_leaves_nothing() -> None:
    with attached(kv_memory="24KiB", host_memory="24KiB") as (model, attachment):
        for _ in range(2):
            with pytest.raises(CapacityError, match=r"KV memory of 18 KiB is full after \d+ tokens of one row; attach"):
                answer(model, outputs=100)
            assert_empty(attachment.engine)
        answer(model, outputs=3)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 3])
def test_what_raises_in_a_step_is_what_generate_raises(error: BaseException, at: int) -> None:
    wanted = answer(tiny_model("llama"))
    with attached() as (model, attachment):
        steps: list[Batch] = []

        def broken(batch: Batch) -> None:
            steps.append(batch)
            if at < len(steps) < 90:
                raise error

        watched(attachment, broken)
        with pytest.raises(type(error)) as raised:
            answer(model)
        assert raised.value is error
        assert_empty(attachment.engine)
        steps += [steps[0]] * 90
        torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("strategy", ["full", "h2o(heavy=4, recent=5)"])
def test_a_failure_that_passes_costs_time_only(strategy: str, at: int) -> None:
    with attached(strategy) as (model, attachment):
        wanted, sizes = answer(model), []

        def broken(batch: Batch) -> None:
            sizes.append(len(batch.requests))
            if len(sizes) == at:
                raise RuntimeError("once")

        watched(attachment, broken)
        torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)
        assert 1 in sizes and sizes[-1] == 4


@pytest.mark.parametrize("shared", [False, True])
def test_prefixes_are_shared_only_if_asked_for(shared: bool) -> None:
    options = {"enable_prefix_caching": True} if shared else {}
    tokens: list[int] = []
    with attached(**options) as (model, attachment):
        watched(attachment, lambda batch: tokens.append(batch.num_tokens))
        first = answer(model, PROMPTS)
        torch.testing.assert_close(answer(model, PROMPTS), first, rtol=1e-4, atol=1e-4)
        assert (attachment.engine.store.books().cached > 0) is shared
    assert tokens[0] == 4 * 13 and (tokens[OUTPUTS] < 4 * 13) is shared


def test_stats_compare_what_was_held_with_full() -> None:
    with attached("streaming_llm(sinks=2, recent=6)", max_batched_tokens=8) as (model, attachment):
        assert attachment.stats is None
        answer(model)
        held = attachment.stats
        assert held is not None and (held.rows, held.tokens) == (4, 4 * 13 - 10 + 4 * (OUTPUTS - 1))
        assert 0 < held.peak_bytes < held.full_bytes
        answer(model, PROMPTS[:1])
        assert attachment.stats is not None and attachment.stats.rows == 1
    with attached() as (model, attachment):
        answer(model)
        stats = attachment.stats
        assert stats is not None and stats.peak_bytes == stats.full_bytes == held.full_bytes
