"""Let ``model.generate`` of transformers run on a cache of ours: it keeps sampling, stopping and streaming.

Rows of a left-padded batch become sequences of their own without padding. What needs to rewind or reorder a cache
(beams, assisted decoding, prompt lookup) is refused, since evicted tokens cannot come back.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence as Seq
from typing import Any, Protocol

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from kvatlas.core.errors import UnsupportedError
from kvatlas.models.generate_options import check_call, check_forward, unpadded
from kvatlas.models.wrappers import running_eagerly


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
    """Tells generate how long its padded rows are; the tokens lie elsewhere.

    It is false, as a cache without layers is: families that give a cache up where their RoPE changes leave this one
    alone, since the driver computes anew what they would, for each row at its own length.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.num_seen = 0

    def __bool__(self) -> bool:
        return False

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

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for ``generate``: the call as it is, on a cache of ours."""
        if self._cache is not None:
            raise UnsupportedError("an attached model runs one generation at a time; wait for the other to end")
        config = check_call(self._model, _by_name(self._generate, args, kwargs))
        if config.cache_implementation is not None:  # generate() takes no cache beside it, whatever it says
            kwargs["cache_implementation"] = None
        self._cache = kwargs["past_key_values"] = _RowCache()
        try:
            with running_eagerly():
                return _without_cache(self._generate(*args, **kwargs))
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
        check_forward(kwargs)
        cache = self._cache
        assert isinstance(cache, _RowCache)
        ids: Tensor = kwargs["input_ids"]
        self._inside = True
        try:
            if cache.num_seen == 0:
                logits = self._driver.begin(unpadded(ids, kwargs.get("attention_mask"), kwargs.get("position_ids")))
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


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, those by position and by keyword alike."""
    signature = inspect.signature(function)
    given = signature.bind(*args, **kwargs).arguments
    for each in signature.parameters.values():
        if each.kind is each.VAR_KEYWORD:
            given.update(given.pop(each.name, {}))
    return given


def _without_cache(result: Any) -> Any:
    """Return what generate returned, less the cache: its rows are closed, so that nothing could be added to it."""
    if isinstance(result, ModelOutput) and isinstance(result.get("past_key_values"), _RowCache):
        return dataclasses.replace(result, past_key_values=None)
    return result
