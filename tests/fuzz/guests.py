"""Guests: requests that run beside an innocent one, and the trouble that they make."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tests.fuzz.harness import RefusedError
from tests.fuzz.values import value
from torch import Tensor

from kvatlas.core.errors import KvatlasError
from kvatlas.core.views import LaneView
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import FinishReason, ForcedOutput, Request
from kvatlas.strategies.keep.streaming_llm import StreamingLLM
from kvatlas.strategies.stage import StageInfo
from kvatlas.strategies.strategy import Strategy

POISON = 97
"""A token on which the model or the tokenizer of a poisoned engine fails; innocents never meet it."""


class InjectedError(Exception):
    """A failure put in on purpose."""


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, put in on purpose."""


calls: Counter[str] = Counter()
"""How often each faulty stage was asked; cleared for each case."""


@dataclass(frozen=True, kw_only=True)
class Faulty(StreamingLLM):
    """A stage of a user's own with a fault.

    Args:
        fault: what it does.
        first: call, counted from 1, at which it begins.
        lasting: whether it goes on.
    """

    name: ClassVar[str] = "faulty"
    info: ClassVar[StageInfo] = StageInfo(summary="fails", paper="none")

    fault: str = "raise"
    first: int = 1
    lasting: bool = True

    def scores(self, view: LaneView) -> Tensor:
        """Return scores, or something else when it is time."""
        calls[str(self)] += 1
        good = super().scores(view)
        lasting = self.lasting and self.fault != "interrupt"  # nobody presses Ctrl-C for ever
        if calls[str(self)] != self.first and not (lasting and calls[str(self)] > self.first):
            return good
        if self.fault == "raise":
            raise InjectedError("scores")
        if self.fault == "interrupt":
            raise Interrupt
        return _WRONG[self.fault](good)  # type: ignore[no-any-return]


_WRONG: dict[str, Any] = {
    "nan": lambda good: good * torch.nan,
    "infinite": lambda good: good + torch.inf,
    "none": lambda good: None,
    "short": lambda good: good[..., :1],
    "long": lambda good: torch.cat([good, good], dim=-1),
    "flat": lambda good: good.flatten(),
    "whole": lambda good: good.long(),
    "boolean": lambda good: good > 0,
    "text": lambda good: "scores",
}
FAULTS = ("raise", "raise", "interrupt", *_WRONG)


class _Rejecting(deque[Any]):
    """A stream's end that takes nothing."""

    def append(self, _: Any) -> None:
        raise InjectedError("unread")


class PoisonedAdapter:
    """A model whose forward fails when a batch holds the poison."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def forward(self, ids: Tensor, *rest: Any, **named: Any) -> Any:
        if bool((ids == POISON).any()):
            raise InjectedError("forward")
        return self._adapter.forward(ids, *rest, **named)


class PoisonedTokenizer:
    """A tokenizer that cannot decode the poison."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._tokenizer(*given, **named)

    def decode(self, ids: Sequence[int], *rest: Any, **named: Any) -> Any:
        if POISON in list(ids):
            raise InjectedError("decode")
        return self._tokenizer.decode(ids, *rest, **named)


@dataclass(kw_only=True)
class Guest:
    """Who comes, when, and what it does.

    Args:
        comes: step at which it is added.
        prompt: its source; see `tests.fuzz.values`.
        params: likewise.
        strategy: a sentence, likewise, or a faulty stage.
        trouble: what it does beside running.
        at: step, after it came, at which it does that.
    """

    comes: int
    prompt: str
    params: str
    strategy: str
    trouble: str
    at: int
    request: Request | None = field(default=None, repr=False)
    more: list[Request] = field(default_factory=list, repr=False)
    refusals: list[str] = field(default_factory=list, repr=False)
    turns: int = field(default=0, repr=False)

    def act(self, engine: Engine, step: int) -> None:
        """Do what is due before a step."""
        try:
            if step == self.comes:
                self._come(engine)
            elif self.request is not None and step >= self.comes + self.at:
                getattr(self, f"_{self.trouble}", lambda *_: None)(engine, self.request)
        except KvatlasError as error:
            self.refusals.append(str(error))

    def leave(self, engine: Engine) -> None:
        """Give back what it holds."""
        for request in [self.request, *self.more]:
            if request is not None:
                engine.cancel(request)
                engine.release(request)

    @property
    def done(self) -> bool:
        """Whether nothing of it runs or will come."""
        return self.request is not None and all(one.finish_reason is not None for one in [self.request, *self.more])

    def _come(self, engine: Engine) -> None:
        strategy = value(self.strategy, Strategy=Strategy, Faulty=Faulty)
        self.request = engine.add_request(value(self.prompt), value(self.params), strategy)
        if self.trouble in ("session", "fork"):
            self.request.held_by_session = True
        elif self.trouble == "generator":
            self.request.generator = object()  # type: ignore[assignment]
        elif self.trouble == "unread":
            self.request.unread = _Rejecting()
        elif self.trouble == "forced":  # poison that a tokenizer meets, and then nothing more
            self.request.forced = ForcedOutput(tokens=(5, POISON))

    def _cancel(self, engine: Engine, request: Request) -> None:
        engine.cancel(request)

    def _swap_params(self, _: Engine, request: Request) -> None:
        request.params = value("SimpleNamespace(max_tokens=3)")

    def _preempt(self, engine: Engine, request: Request) -> None:
        scheduler = engine.scheduler
        if self.turns < 3 and request in scheduler.running and request not in scheduler.suspects:
            self.turns += 1  # without end it would never get anywhere
            scheduler._preempt(request)

    def _session(self, engine: Engine, request: Request) -> None:
        ended = request.finish_reason
        if ended is None or ended in (FinishReason.CANCELLED, FinishReason.ERROR) or self.turns == 2:
            return
        self.turns += 1
        engine.continue_request(request, value(self.prompt), value(self.params) or SamplingParams())

    def _fork(self, engine: Engine, request: Request) -> None:
        ended = request.finish_reason
        if ended is None or ended in (FinishReason.CANCELLED, FinishReason.ERROR) or self.turns:
            return
        self.turns = 1
        self.more.append(engine.fork_request(request))
        engine.continue_request(self.more[0], [7, 9, 11], SamplingParams(max_tokens=3))
        engine.continue_request(request, value(self.prompt), value(self.params) or SamplingParams())


TROUBLES = ("none", "cancel", "swap_params", "preempt", "session", "session", "fork", "generator", "unread", "forced")


def raise_refusals(guests: Sequence[Guest]) -> None:
    """Count a case as refused if a guest was."""
    refusals = [text for guest in guests for text in guest.refusals]
    if refusals:
        raise RefusedError(refusals[0])
