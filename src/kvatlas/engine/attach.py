"""``kvatlas.attach`` and ``kvatlas.detach``: for those who keep calling ``model.generate`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from kvatlas.core.errors import CapacityError
from kvatlas.core.units import format_bytes
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.engine.runner import Batch, Runner, renewed_at
from kvatlas.engine.staging import staged_slots
from kvatlas.models.bridge import GenerateBridge
from kvatlas.models.linear import LinearChoice
from kvatlas.models.loading import LoadedModel, adapt
from kvatlas.models.owner import adapter_of
from kvatlas.models.wrappers import running_eagerly, unwrapped
from kvatlas.strategies.plan import Plan
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
        kv_memory: byte budget of the cache.
        linear_weights: how linears keep weights for few rows, or ``"off"``; see `kvatlas.models.linear`.
        engine_options: further options of `kvatlas.engine.engine.Engine`.

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
            engine = Engine(loaded, kv_memory=kv_memory, **engine_options)
            plan = engine.prepare(parsed)
        except BaseException:
            adapter.restore()
            raise
    return Attachment(engine, plan)


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


class Attachment:
    """A model under a strategy; a context manager that detaches on exit.

    Args:
        engine: owns the adapter and the store.
        plan: what manages the cache.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.engine = engine
        self._adapter = engine.model.adapter
        bridge = GenerateBridge(self._adapter.model, _Rows(engine, plan))
        self._adapter.on_restore(bridge.restore)

    def detach(self) -> None:
        """Give the model its own attention, ``forward`` and ``generate`` back; once is enough."""
        self._adapter.restore()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class _Rows:
    """The rows of one generation as requests that only transformers schedules."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine = engine
        self._plan = plan
        self._runner = Runner(engine.model.adapter, engine.store, engine.transport)
        self._requests: list[Request] = []

    def begin(self, prompts: Seq[list[int]]) -> Tensor:
        """Process the prompts in chunks, one after another, and return the logits after each [B, V]."""
        self._engine.model.adapter.linears.refresh()
        rows = []
        for prompt in prompts:
            self._requests.append(self._request(prompt))
            rows.append(self._process(self._requests[-1]))
        return torch.cat(rows)

    def advance(self, tokens: Seq[int]) -> Tensor:
        """Append one token to each row and return the logits after it [B, V]."""
        logits: dict[Request, Tensor] = {}
        decodes = []
        for request, token in zip(self._requests, tokens, strict=True):
            request.tokens.append(token)
            length = renewed_at(self._engine.model.adapter, request)
            if length is None:
                self._extend(request, 1)
                decodes.append(request)
            else:
                self._close(request)
                request.begin_anew(length)
                logits[request] = self._process(request)
        if decodes:
            due, rows = self._runner.run(Batch(chunks=[], decodes=decodes))
            logits.update((request, rows[[row]]) for row, request in enumerate(due))
        return torch.cat([logits[request] for request in self._requests])

    def end(self) -> None:
        """Give all blocks back."""
        for request in self._requests:
            self._close(request)
        self._requests = []

    def _request(self, prompt: list[int]) -> Request:
        return Request(
            id=f"row-{len(self._requests)}",
            tokens=prompt,
            params=SamplingParams(),
            plan=self._plan,
            footprint=self._engine.checked_footprint(self._plan, len(prompt), 1),
            arrival_s=self._engine.clock(),
            prefill_spans=[(0, len(prompt))],
            output_start=len(prompt),
        )

    def _process(self, request: Request) -> Tensor:
        """Process the prompt of a row in chunks, on a sequence of its own, and return the logits after it [1, V]."""
        store, logits = self._engine.store, torch.empty(0)
        request.seq = store.open(store.layout(request.plan.cache))
        request.seq.encodes = request.plan.encodes(in_prompt=True)
        while (end := request.prefill_end) is not None:
            count = min(end - request.computed, self._engine.max_batched_tokens)
            self._extend(request, count)
            _, logits = self._runner.run(Batch(chunks=[(request, count)], decodes=[]))
        return logits

    def _close(self, request: Request) -> None:
        if request.seq is not None:
            self._engine.store.close(request.seq)
            request.forget_cache()

    def _extend(self, request: Request, count: int) -> None:
        assert request.seq is not None
        store, staged = self._engine.store, staged_slots(self._engine.store, request, count)
        if not store.try_extend(request.seq, count, staged):
            tier = store.short_of(store.blocks_needed(request.seq, count, staged)) or store.arena
            on_host, total = tier is store.host, format_bytes(tier.total_bytes)
            raise CapacityError(
                f"{'host' if on_host else 'KV'} memory of {total} is full after {request.computed} tokens of one of "
                f"{len(self._requests)} rows; attach with more {'host_memory' if on_host else 'kv_memory'}, "
                "a smaller batch or a strategy that holds less"
            )
