"""Ask a model about planted facts, in one prompt or over the turns of a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvatlas.core.errors import ConfigError
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.experiments.holdings import holdings
from kvatlas.models.loading import LoadedModel
from kvatlas.records.schema import Sample
from kvatlas.workloads.recall import RecallPrompt, RecallTask, make_recall_prompts, read_filler

_AT_ONCE = 64
"""Conversations that are held at a time: enough to fill a batch, few enough for a small pool."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What is said to a model, and what it should answer at the end.

    Args:
        turns: token ids of each turn; the last one asks.
        answer: token ids expected after the last turn.
        reply_tokens: tokens that the model says after each earlier turn.
    """

    turns: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]
    reply_tokens: int = 4


def ask(engine: Engine, conversations: Sequence[Conversation], strategy: str) -> list[Sample]:
    """Hold all conversations and return whether each ended in exactly the answer expected, 1 or 0, by its number.

    ``kv_after_prefill`` are the bytes that the first one held when its last turn had been read.
    """
    samples: list[Sample] = []
    for start in range(0, len(conversations), _AT_ONCE):
        group = conversations[start : start + _AT_ONCE]
        answers, held = _hold(engine, group, strategy)
        if not start:
            samples.append(Sample(metric="kv_after_prefill", unit="bytes", value=held))
        for number, (conversation, answer) in enumerate(zip(group, answers, strict=True), start=start):
            samples.append(Sample(metric="correct", unit="", value=float(answer == conversation.answer), index=number))
    return samples


def planted(
    model: LoadedModel, *, num_keys: int, context_tokens: int, fact_depth: float | None, n: int, seed: int
) -> list[RecallPrompt]:
    """Return ``n`` prompts with planted facts; see `RecallTask`.

    Raises:
        ConfigError: the model has no tokenizer, or the facts do not fit into the context.
    """
    try:
        task = RecallTask(num_keys=num_keys, context_tokens=context_tokens, fact_depth=fact_depth)
        return make_recall_prompts(task, encoder(model), read_filler(), n, seed)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{error}; change the context or the number of facts") from error


def encoder(model: LoadedModel) -> Callable[[str], list[int]]:
    """Return text -> token ids without special tokens.

    Raises:
        ConfigError: the model has no tokenizer, so it cannot be asked anything.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{model.name} has no tokenizer; questions are asked in text, choose another model")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


def _hold(engine: Engine, group: Sequence[Conversation], strategy: str) -> tuple[list[tuple[int, ...]], int]:
    """Return the last answers, and the KV bytes of the first conversation when its last turn had been read."""
    requests: list[Request] = []
    held = 0
    for turn in range(len(group[0].turns)):
        last = turn == len(group[0].turns) - 1
        for number, conversation in enumerate(group):
            expected = len(conversation.answer) if last else conversation.reply_tokens
            params = SamplingParams(max_tokens=expected, ignore_eos=True)
            if turn:
                engine.continue_request(requests[number], conversation.turns[turn], params)
                continue
            requests.append(engine.add_request(conversation.turns[0], params, strategy))
            requests[-1].held_by_session = not last
        held = _run(engine, requests[0])
    answers = [tuple(request.output_ids) for request in requests]
    for request in requests:
        engine.release(request)
    return answers, held


def _run(engine: Engine, first: Request) -> int:
    """Run everything and return the KV bytes that the first request held when its prompt was done."""
    held = 0
    while engine.has_work:
        engine.step()
        if not held and first.seq is not None and first.token_times_s:
            now = holdings(engine.store, first.seq)
            held = now.device_kv + now.host_kv
    return held
