"""Score given continuations under a strategy: what would the model, with the cache cut, have thought of them?

A context and a continuation fed as one prompt would measure nothing of an evicting strategy: each token would see
the whole prompt. So the context is the prompt, the strategy cuts after it, and the continuation follows as decode
steps whose tokens are forced (teacher forcing); each log-probability comes from a step that attends to the cut cache.

The first token of a continuation is predicted by the last token of the context. In generation that token is part of
the prompt and sees all of it. With ``held_back = 1`` it becomes a decode step, so that the first token is scored
under the cut cache too; a continuation of one token, such as " yes", would otherwise not depend on the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvatlas.core.errors import ConfigError
from kvatlas.core.messages import shown
from kvatlas.engine.engine import Engine
from kvatlas.engine.given import is_whole
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.prompts import token_ids
from kvatlas.engine.request import ForcedOutput, Request, raise_if_failed
from kvatlas.strategies.strategy import Strategy

# Requests that wait in the engine at most; the rest waits outside, because the engine searches its queues.
_QUEUED = 64


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """A continuation to score.

    Args:
        context: token ids before it, at least one.
        continuation: token ids, at least one.

    Raises:
        ConfigError: one of them holds something else than token ids.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("context", "continuation"):
            object.__setattr__(self, name, tuple(token_ids(getattr(self, name), f"the {name}")))


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the model thought of a continuation.

    Args:
        logprobs: natural log-probability of each of its tokens, given all tokens before.
        is_greedy: whether each of them was the most likely one.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Natural log-probability of the continuation."""
        return sum(self.logprobs)


def score(
    engine: Engine,
    jobs: Iterable[ScoreJob],
    strategy: str | Strategy,
    *,
    held_back: int = 1,
    on_finished: Callable[[int], object] | None = None,
) -> list[Score]:
    """Return the scores of ``jobs``, in their order.

    They run as requests of the engine: batched, chunked, within its memory, preempted where that is short.

    Args:
        engine: what runs them; other requests that it holds go on beside them.
        jobs: what to score.
        strategy: what manages each cache.
        held_back: last tokens of each context that are fed as decode steps, after the cut; the first token of a
            context is always prompt. 0 is what generation does.
        on_finished: called with the number of jobs that a step finished.

    Raises:
        ConfigError: a context or continuation is empty or holds an id outside the vocabulary, or ``held_back`` is
            negative.
        CapacityError: a job could never fit, even alone.
    """
    if not is_whole(held_back) or held_back < 0:
        raise ConfigError(
            f"held_back is {shown(held_back)}; write 0 or the number of context tokens to feed after the cut"
        )
    parsed, coming = Strategy.parse(strategy), iter(jobs)
    outputs: list[ForcedOutput] = []
    active: list[Request] = []
    try:
        while True:
            while not active or len(engine.scheduler.waiting) < _QUEUED:
                job = next(coming, None)
                if job is None:
                    break
                outputs.append(ForcedOutput(tokens=job.continuation))
                active.append(_add(engine, job, parsed, held_back, outputs[-1]))
            if not active:
                return [Score(logprobs=tuple(each.logprobs), is_greedy=all(each.greedy)) for each in outputs]
            engine.step()
            raise_if_failed([request for request in active if request.error is not None])
            left = [request for request in active if request.finish_reason is None]
            if on_finished is not None and len(left) < len(active):
                on_finished(len(active) - len(left))
            active = left
    finally:  # after an error or Ctrl-C nothing keeps running
        for request in active:
            engine.cancel(request)


def _add(engine: Engine, job: ScoreJob, strategy: Strategy, held_back: int, output: ForcedOutput) -> Request:
    """Queue one job; its prompt is the context without what is held back."""
    if not job.continuation:
        raise ConfigError("a continuation is empty; give at least one token to score")
    vocabulary = engine.store.lanes.shape.vocab_size
    wrong = next((token for token in job.continuation if token >= vocabulary), None)
    if wrong is not None:
        raise ConfigError(f"token id {wrong} of a continuation is outside the vocabulary of {vocabulary} tokens")
    params = SamplingParams(max_tokens=len(job.continuation), ignore_eos=True)
    request = engine.add_request(job.context, params, strategy)
    prompt = max(1, len(job.context) - held_back)
    if prompt < len(job.context):
        steps = len(job.context) - prompt + len(job.continuation)
        request.prefill_spans = [(0, prompt)]
        request.footprint = engine.checked_footprint(request.plan, prompt, steps)
    request.forced = output
    return request
