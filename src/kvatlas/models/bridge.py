"""Let ``model.generate`` of transformers run on a cache of ours: it keeps sampling, stopping and streaming.

Rows of a left-padded batch become sequences of their own without padding. What needs to rewind or reorder a cache
(beams, assisted decoding, prompt lookup) is refused, since evicted tokens cannot come back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence as Seq
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.models.wrappers import running_eagerly

# generate() options, the value that leaves them off, and what they would need.
_REFUSED = {
    "num_beams": (1, "beams reorder the cache"),
    "assistant_model": (None, "assisted decoding rewinds the cache"),
    "prompt_lookup_num_tokens": (None, "prompt lookup rewinds the cache"),
    "past_key_values": (None, "the cache is kvatlas's own"),
    "inputs_embeds": (None, "sequences are made of token ids"),
    "prefill_chunk_size": (None, "kvatlas chunks prompts itself"),
    "use_cache": (True, "the strategy is about the cache"),
    "output_attentions": (False, "attention is not returned"),
    "output_hidden_states": (False, "hidden states are not returned"),
}


class RowDriver(Protocol):
    """Runs the rows of one generation."""

    def begin(self, prompts: Seq[list[int]]) -> Tensor:
        """Process the prompts and return the logits after each [B, V]."""
        ...

    def advance(self, tokens: Seq[int]) -> Tensor:
        """Append one token to each row and return the logits after it [B, V]."""
        ...

    def end(self) -> None:
        """Give the cache back."""
        ...


class _RowCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Tells generate how long its padded rows are; the tokens lie elsewhere."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.num_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the padded length of the rows, tokens."""
        return self.num_seen


class GenerateBridge:
    """Patches one model object so that its ``generate`` runs through a driver.

    Args:
        model: a causal LM, already adapted.
        driver: runs the rows.
    """

    def __init__(self, model: PreTrainedModel, driver: RowDriver) -> None:
        self._model = model
        self._driver = driver
        self._forward = model.forward
        self._generate = model.generate
        self._cache: Any = None  # the live generation's _RowCache
        self._inside = False
        self._own = {name: vars(model)[name] for name in ("forward", "generate") if name in vars(model)}
        model.forward = _with_signature_of(self._forward, self._step)
        model.generate = _with_signature_of(self._generate, self._run)

    def restore(self) -> None:
        """Give the model its own ``forward`` and ``generate`` back, also those set on the object by others."""
        for name in ("forward", "generate"):
            vars(self._model).pop(name, None)
        vars(self._model).update(self._own)

    def _run(self, inputs: Tensor | None = None, generation_config: Any = None, **options: Any) -> Any:
        if self._cache is not None:
            raise UnsupportedError("an attached model runs one generation at a time; wait for the other to end")
        config = self._model.generation_config if generation_config is None else generation_config
        for source in (vars(config), options):
            for name, (off, reason) in _REFUSED.items():
                if source.get(name, off) not in (off, None):
                    raise UnsupportedError(f"{name}={source[name]!r} cannot be used while attached: {reason}")
        self._cache = _RowCache()
        try:
            options["past_key_values"] = self._cache
            with running_eagerly():
                return self._generate(inputs, generation_config=generation_config, **options)
        finally:
            self._cache = None
            self._driver.end()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for ``forward``: generate's calls go to the driver, the driver's own pass through."""
        if self._inside:
            return self._forward(*args, **kwargs)
        if self._cache is None or kwargs.get("past_key_values") is not self._cache:
            raise UnsupportedError(
                "while attached, a model answers generate() only; call kvatlas.detach(model) to run it directly"
            )
        cache = self._cache
        assert isinstance(cache, _RowCache)
        ids: Tensor = kwargs["input_ids"]
        self._inside = True
        try:
            if cache.num_seen == 0:
                logits = self._driver.begin(_unpadded(ids, kwargs.get("attention_mask")))
            elif ids.shape[1] == 1:
                logits = self._driver.advance(ids[:, 0].tolist())
            else:
                raise UnsupportedError(f"generate passed {ids.shape[1]} tokens at once after the prompt")
        finally:
            self._inside = False
        cache.num_seen += ids.shape[1]
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)


def _with_signature_of(original: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``stand_in`` looking like ``original``: generate inspects what forward accepts."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return stand_in(*args, **kwargs)

    return call


def _unpadded(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Return the tokens of each row [B, T] without its padding on the left."""
    mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    rows: list[list[int]] = []
    for row, keep in zip(ids.tolist(), mask.bool().tolist(), strict=True):
        first = keep.index(True) if True in keep else len(row)
        if not all(keep[first:]) or first == len(row):
            raise ConfigError("attention_mask must hide padding on the left only and leave a token in every row")
        rows.append(row[first:])
    return rows
