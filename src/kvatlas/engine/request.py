"""A request: its tokens, how far the cache has got with them, and what happened when."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from kvatlas.core.errors import RequestError
from kvatlas.core.footprint import Footprint
from kvatlas.engine.params import SamplingParams
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.swap import SwappedSequence
from kvatlas.strategies.plan import Plan
from kvatlas.strategies.strategy import Strategy


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(kw_only=True)
class ForcedOutput:
    """An output decided beforehand, and what the model thought of each of its tokens when it was due.

    Args:
        tokens: what comes out, whatever the logits say; at least one.
        logprobs: natural log-probability of each token so far, under the plain softmax of its logits.
        greedy: whether each was the most likely token.
    """

    tokens: tuple[int, ...]
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)


@dataclass(kw_only=True)
class AskedOutput:
    """An output that somebody outside of the engine chooses, token by token; see `Engine.give`.

    Args:
        logits: [V] after the last known token, as the model gave them; None while they are being computed.
        bounded: output tokens that the request's footprint is of.
    """

    logits: Tensor | None = None
    bounded: int = 1


@dataclass(eq=False)
class Request:
    """One generation.

    The cache of a request is made by *prefill spans*, ranges of ``tokens`` processed in chunks, and by decode steps
    for everything between. A request that lost its cache is brought back by walking through the same spans and
    steps again, with tokens that are known already; where the plan is *recomputable*, one span serves instead.

    Args:
        id: unique name.
        tokens: prompt and output, as far as known.
        params: sampling and ending.
        plan: what manages its cache, resolved for the model.
        footprint: bounds on its bytes.
        arrival_s: when it arrived, on the engine's clock.
        prefill_spans: ranges [start, end) of ``tokens`` that are prompts.
        output_start: index of the first token that this request generates.
        unread: tokens that a stream has not given out yet; None where nobody streams.
        forced: the output, where it is scored instead of chosen; see `kvatlas.engine.scoring`.
        asked: the output, where it is chosen outside; see `kvatlas.engine.attach`.
        error: what ended it, where ``finish_reason`` says that it failed.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    plan: Plan
    footprint: Footprint
    arrival_s: float
    prefill_spans: list[tuple[int, int]]
    output_start: int
    seq: Sequence | None = None
    swapped: SwappedSequence | None = None
    adopted_tokens: int = 0
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    token_times_s: list[float] = field(default_factory=list)
    generator: torch.Generator | None = None
    text: str = ""
    held_by_session: bool = False
    unread: deque[NewToken] | None = None
    peak_bytes: int = 0
    forced: ForcedOutput | None = None
    asked: AskedOutput | None = None
    error: Exception | None = None

    @property
    def strategy(self) -> Strategy:
        """What manages its cache, as the user wrote it."""
        return self.plan.strategy

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache, or were before a strategy evicted them."""
        if self.seq is not None:
            return self.seq.seen
        return 0 if self.swapped is None else self.swapped.seq.seen

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.output_start :]

    @property
    def prefill_end(self) -> int | None:
        """End of the prefill span that the next token belongs to; None if the next token is a decode step."""
        for start, end in self.prefill_spans:
            if start <= self.computed < end:
                return end
        return None

    @property
    def ends_prefill_span(self) -> bool:
        """Whether the last computed token was the last of a prompt."""
        return any(end == self.computed for _, end in self.prefill_spans)

    @property
    def prompt_tokens(self) -> int:
        """Tokens up to the end of the last prefill span that has begun: what fractions of a strategy refer to."""
        return max(end for start, end in self.prefill_spans if start < max(self.computed, 1))

    @property
    def sampling_due(self) -> bool:
        """Whether every known token is in the cache, so that the next one must be chosen."""
        return self.computed == len(self.tokens)

    def forget_cache(self) -> None:
        """Prepare for being computed anew; the caller has freed the sequence."""
        self.seq = None
        self.adopted_tokens = 0

    def begin_anew(self, tokens: int) -> None:
        """Make one prompt of the first ``tokens`` tokens and of any prompt that they reach into."""
        end = max([tokens, *(end for start, end in self.prefill_spans if start < tokens)])
        self.prefill_spans = [(0, end)] + [span for span in self.prefill_spans if span[0] >= end]


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """One token just generated.

    Args:
        request: who it belongs to.
        token_id: the token.
        text: what it adds to the output text; may be empty while a character is incomplete.
        finished: whether the request has ended with it.
    """

    request: Request
    token_id: int
    text: str
    finished: bool


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """A finished output, named as vLLM names it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Args:
        request_id: unique name.
        prompt_token_ids: everything before the output; for a session, the whole conversation so far.
        outputs: the completion, as a tuple of one.
        strategy: what managed the cache.
        arrival_s: when the request arrived, on the engine's clock.
        token_times_s: when each token was generated.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        num_preemptions: how often its cache was taken away.
        peak_bytes: most bytes of blocks that it held, sidecars included.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    strategy: str
    arrival_s: float
    token_times_s: tuple[float, ...]
    num_cached_tokens: int
    num_preemptions: int
    peak_bytes: int


def raise_if_failed(requests: Seq[Request]) -> None:
    """Raise for the first request that failed; all have ended.

    Raises:
        RequestError: one failed. It carries the outputs of all.
    """
    failed = [request for request in requests if request.error is not None]
    if not failed:
        return
    cause = failed[0].error
    others = f", and {len(failed) - 1} more of {len(requests)}" if len(failed) > 1 else ""
    raise RequestError(
        f"{failed[0].id} failed after {len(failed[0].output_ids)} output tokens{others}: "
        f"{type(cause).__name__}: {cause}",
        [output_of(request) for request in requests],
    ) from cause


def output_of(request: Request) -> RequestOutput:
    """Return the finished request as users see it."""
    reason = request.finish_reason
    assert reason is not None
    completion = CompletionOutput(text=request.text, token_ids=tuple(request.output_ids), finish_reason=reason.value)
    return RequestOutput(
        request_id=request.id,
        prompt_token_ids=tuple(request.tokens[: request.output_start]),
        outputs=(completion,),
        strategy=str(request.strategy),
        arrival_s=request.arrival_s,
        token_times_s=tuple(request.token_times_s),
        num_cached_tokens=request.adopted_tokens,
        num_preemptions=request.num_preemptions,
        peak_bytes=request.peak_bytes,
    )
