"""``kvatlas.attach`` and ``kvatlas.detach``: for those who keep calling ``model.generate`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import AskedOutput, Request
from kvatlas.models.bridge import GenerateBridge
from kvatlas.models.fast import LinearChoice
from kvatlas.models.loading import LoadedModel, adapt
from kvatlas.models.owner import adapter_of
from kvatlas.models.wrappers import running_eagerly, unwrapped
from kvatlas.strategies.strategy import Strategy


def attach(
    model: Any,
    strategy: str | Strategy = "full",
    *,
    kv_memory: str | int = "512MiB",
    linear_weights: LinearChoice = "auto",
    **engine_options: Any,
) -> Attachment:
    """Make ``model.generate`` run under a strategy until it is detached; return the attachment.

    Greedy search and sampling work, batches too; beams, assisted decoding and other uses that rewind the cache are
    refused, and so is a second generation while one is live. The model stays attached if the attachment is dropped;
    `detach` finds it.

    Args:
        model: a causal LM of transformers, used in place; or one inside of torch.compile, data parallelism or a PEFT
            adapter that replaces linears, such as LoRA.
        strategy: what manages the cache.
        kv_memory: byte budget of the cache. Rows that it does not hold together take turns, slowly; a row that
            outgrows it alone ends the generation with a `kvatlas.core.errors.CapacityError`.
        linear_weights: how linears keep weights for few rows, or ``"off"``; see `kvatlas.models.fast`.
        engine_options: further options of `kvatlas.engine.engine.Engine`. Prefixes are not shared unless
            ``enable_prefix_caching=True`` says so: a cached one would outlive a change of the model's weights.

    Raises:
        ConfigError: the strategy cannot be read or composed, or ``model`` is no causal LM of transformers.
        UnsupportedError: the model's family or a wrapper is refused, with the reason, or the model is attached already.

    Example:
        >>> from kvatlas.models.loading import load_model
        >>> model = load_model("random:llama-mini").adapter
        >>> hf_model = model.model
        >>> model.restore()
        >>> with attach(hf_model, "streaming_llm(recent=16)"):
        ...     hf_model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 5])
    """
    parsed = Strategy.parse(strategy)
    with running_eagerly():
        adapter = adapt(unwrapped(model, "attach()"), linear_weights=linear_weights)
        try:
            loaded = LoadedModel(adapter=adapter, tokenizer=None, name=adapter.shape.name)
            engine = Engine(loaded, kv_memory=kv_memory, **{"enable_prefix_caching": False, **engine_options})
            engine.prepare(parsed)
        except BaseException:
            adapter.restore()
            raise
    return Attachment(engine, parsed)


def detach(model: Any) -> None:
    """Give a model its own attention, ``forward`` and ``generate`` back, whoever holds its attachment.

    A model that is not attached stays as it is. An `LLM` that was made of the model cannot run it any more.

    Args:
        model: what was given to `attach`, or the model inside.

    Raises:
        ConfigError: ``model`` is no causal LM of transformers.
        UnsupportedError: it is a copy that was made while the original was attached.
    """
    adapter = adapter_of(unwrapped(model, "detach()"))
    if adapter is not None:
        adapter.restore()


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What the rows of one generation held.

    Args:
        rows: how many there were.
        tokens: what the model was run on: prompts without padding and outputs, of each row all but the last token.
        peak_bytes: most bytes of device blocks that each row held, sidecars included, summed over rows.
        full_bytes: what that is under ``full``, by its footprint.
    """

    rows: int
    tokens: int
    peak_bytes: int
    full_bytes: int


class Attachment:
    """A model under a strategy; a context manager that detaches on exit.

    Args:
        engine: owns the adapter and the store.
        strategy: what manages the cache.
    """

    def __init__(self, engine: Engine, strategy: Strategy) -> None:
        self.engine = engine
        self._adapter = engine.model.adapter
        self._rows = _Rows(engine, strategy)
        bridge = GenerateBridge(self._adapter.model, self._rows)
        self._adapter.on_restore(bridge.restore)

    @property
    def stats(self) -> GenerationStats | None:
        """What the last generation that ran held, also if it failed; None before the first."""
        return self._rows.stats

    def detach(self) -> None:
        """Give the model its own attention, ``forward`` and ``generate`` back; once is enough."""
        self._adapter.restore()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class _Rows:
    """The rows of one generation as requests of the engine, whose tokens transformers chooses."""

    def __init__(self, engine: Engine, strategy: Strategy) -> None:
        self._engine = engine
        self._strategy = strategy
        self._requests: list[Request] = []
        self.stats: GenerationStats | None = None

    def begin(self, prompts: Seq[list[int]]) -> Tensor:
        """Process the prompts and return the logits after each [B, V]."""
        for prompt in prompts:
            request = self._engine.add_request(prompt, SamplingParams(max_tokens=1), self._strategy)
            request.asked = AskedOutput()
            self._requests.append(request)
        return self._logits()

    def advance(self, tokens: Seq[int]) -> Tensor:
        """Append one token to each row and return the logits after it [B, V]."""
        for request, token in zip(self._requests, tokens, strict=True):
            self._engine.give(request, token)
        return self._logits()

    def end(self) -> None:
        """Give all blocks back and say what was held."""
        for request in self._requests:
            self._engine.cancel(request)
        if any(request.peak_bytes for request in self._requests):
            self.stats = self._held()
        self._requests = []

    def _held(self) -> GenerationStats:
        lengths = [(request.output_start, len(request.output_ids)) for request in self._requests]
        full = Strategy.parse("full")
        return GenerationStats(
            rows=len(lengths),
            tokens=sum(prompt + output for prompt, output in lengths),
            peak_bytes=sum(request.peak_bytes for request in self._requests),
            full_bytes=sum(self._engine.footprint(full, *each).peak_bytes for each in lengths),
        )

    def _logits(self) -> Tensor:
        """Step until the next token of every row is due; where memory is short, rows take turns."""
        while True:
            logits = [request.asked.logits for request in self._requests if request.asked is not None]
            due = [logits_V for logits_V in logits if logits_V is not None]
            if len(due) == len(self._requests):
                return torch.stack(due)
            self._engine.step()
            for request in self._requests:
                if request.error is not None:
                    raise request.error
