"""Run any Hugging Face causal LM over a packed batch, with its attention answered by a context of ours.

The model stays transformers': weights, projections, norms, RoPE, experts and the head are its own code. The
adapter packs the batch without padding, switches the attention implementation, observes the model's shape,
and checks after every forward that each attention layer was called exactly once.
Shapes: T packed tokens, N rows of logits, V token ids; H, Hq, Dk, Dv as in `kvatlas.models.attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvatlas.core.errors import UnsupportedError
from kvatlas.core.observer import SpanKind, current_observer
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.models import owner
from kvatlas.models.attention import (
    IMPLEMENTATION,
    AttentionCall,
    AttentionContext,
    Forward,
    register,
    running,
)
from kvatlas.models.fast import FastParts, LinearChoice
from kvatlas.models.foresight import Foresight
from kvatlas.models.rope import LengthRope

__all__ = ["Adapter", "AttentionCall", "AttentionContext"]

# For families that name no longest context, such as those without position embeddings.
_NO_LIMIT = 2**31 - 1


class Adapter:
    """A causal LM of transformers that attends through a context.

    Creating one puts the model into eval mode, switches its attention implementation, runs one forward of two tokens
    to observe its shape, and replaces its linears and layers. `restore` undoes the switches; as a context manager the
    adapter restores on exit.

    Args:
        model: a loaded causal LM; it is used, not copied.
        name: what reports call it; the model's own name if None.
        linear_weights: how linears keep weights for few rows; see `kvatlas.models.fast.linears.SmallLinears`.

    Attributes:
        fast: linears and decoder layers that run natively.

    Raises:
        UnsupportedError: the family cannot be run this way, or its linears not with these weights; the text names the
            reason.
        CapacityError: there is too little memory for the copies that were asked for.
    """

    def __init__(
        self, model: PreTrainedModel, *, name: str | None = None, linear_weights: LinearChoice = "auto"
    ) -> None:
        self.model = model
        self._arguments = _forward_arguments(model)
        self._was_training = bool(model.training)
        self._implementations = _current_implementations(model)
        self._rope = LengthRope(model)
        self._order: dict[int, int] | None = None
        self._foresight: Foresight | None = None
        self.fast = FastParts(model, "off")
        self._restored = False
        self._undo: list[Callable[[], None]] = []
        self._switch()
        try:
            self.shape, self.dtype = self._observe(name)
            self.fast = FastParts(model, linear_weights)
        except BaseException:
            self.restore()
            raise

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.model.device
        return device

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context: AttentionContext,
        logits_for: Tensor,
        *,
        rope_tokens: int | None = None,
    ) -> Tensor:
        """Return the logits [N, V] of some rows of a packed batch; ``context`` stores keys and values.

        Runs in inference mode: copy the logits before changing them outside of it.

        Args:
            input_ids: int64 [T], the new tokens of all sequences, one sequence after the other.
            position_ids: int64 [T], the position of each in its sequence.
            context: answers the attention of every layer.
            logits_for: int64 [N], the rows of the batch whose logits are wanted; may be empty.
            rope_tokens: length in tokens that decides the RoPE regime; all sequences of the batch must have
                the same `rope_regime`. Needed only where that is not None.

        Raises:
            UnsupportedError: a layer was not called exactly once, or asks for something unknown.
            ConfigError: ``rope_tokens`` is missing or does not fit the positions.
        """
        if self._restored:
            raise UnsupportedError("this adapter was restored; create a new one to run the model")
        shows = None
        if self._foresight is not None and self._foresight.installed and hasattr(context, "before_layer"):
            shows = self._foresight.show
        forward = Forward(context=context, order=self._order, shows=shows)
        span, rope = current_observer().span(SpanKind.MODEL), self._rope.length(rope_tokens, position_ids)
        with torch.inference_mode(), rope, running(forward), span:
            output = self.model(
                input_ids=input_ids[None], position_ids=position_ids[None], **self._optional(logits_for)
            )
        self._check_calls(forward)
        logits: Tensor = output.logits[0]
        return logits if "logits_to_keep" in self._arguments else logits[logits_for]

    def watch_inputs(self) -> None:
        """From now on show each layer's input to contexts that have ``before_layer``."""
        assert self._foresight is not None
        self._foresight.install()

    def rope_regime(self, total_tokens: int) -> Hashable:
        """Return what the RoPE of a sequence of this length depends on.

        Sequences may be packed together if their values are equal. None for nearly all models; for longrope
        whether the sequence exceeds the original context; for dynamic NTK, beyond it, the exact length.

        Args:
            total_tokens: length of the sequence, prompt included, as later given as ``rope_tokens``.
        """
        return self._rope.regime(total_tokens)

    def renewed_at(self, began: int, tokens: int) -> int | None:
        """Return the length at which a cache is computed anew between two lengths, as the family's ``generate`` does.

        None for nearly all models, whose keys stay as they were cached. Phi-3 with longrope, once a sequence exceeds
        the original context, rotates all of it otherwise.

        Args:
            began: length in tokens of the prompt that the cache began with.
            tokens: length in tokens that is to be reached.
        """
        return self._rope.renewed_at(began, tokens)

    def on_restore(self, undo: Callable[[], None]) -> None:
        """Let ``restore`` call this first: what else was done to the model since."""
        self._undo.insert(0, undo)

    def restore(self) -> None:
        """Give the model its own attention, RoPE, linears and training mode back; the adapter is then used up."""
        if self._restored:
            return
        self._restored = True
        owner.give_up(self.model)
        for undo in self._undo:
            undo()
        if self._foresight is not None:
            self._foresight.remove()
        self._rope.remove()
        self.fast.restore()
        self.model.set_attn_implementation(self._implementations)
        self.model.train(self._was_training)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _switch(self) -> None:
        register()
        owner.take(self.model, self)
        self.model.eval()
        self.model.set_attn_implementation(IMPLEMENTATION)
        self._rope.install()

    def _optional(self, logits_for: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if "logits_to_keep" in self._arguments:
            arguments["logits_to_keep"] = logits_for
        if "use_cache" in self._arguments:
            arguments["use_cache"] = False
        return arguments

    def _observe(self, name: str | None) -> tuple[ModelShape, torch.dtype]:
        recorder = _Recorder()
        tokens = torch.arange(2, device=self.device)
        self.forward(tokens, tokens, recorder, tokens[-1:], rope_tokens=len(tokens))
        config = self.model.config.get_text_config(decoder=True)
        shape = ModelShape(
            name=name or self.model.name_or_path or config.model_type,
            layers=tuple(recorder.layers),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_positions=int((getattr(config, "max_position_embeddings", None) or _NO_LIMIT) * self._rope.stretch),
            num_parameters=sum(weight.numel() for weight in self.model.parameters()),
        )
        return shape, recorder.keys[0].dtype

    def _check_calls(self, forward: Forward) -> None:
        """Refuse a forward that left layers out: their tokens would be missing from the cache."""
        family, called = self.model.config.model_type, forward.called
        if self._order is None:
            if not called:
                raise UnsupportedError(f"{family} does not attend through transformers' AttentionInterface")
            expected = self.model.config.get_text_config(decoder=True).num_hidden_layers
            if len(called) != expected:
                raise UnsupportedError(f"{family} has {expected} layers, but {len(called)} of them attend")
            self._order = {index: place for place, index in enumerate(called)}
            self._foresight = Foresight(forward.modules, self._order)
        elif len(called) != len(self._order):
            missing = sorted(set(self._order) - set(called))
            raise UnsupportedError(f"{family} skipped the attention of layers {missing} in this forward")


class _Recorder:
    """Notes the shape of every layer; keeps the keys, so that equal addresses mean equal tensors."""

    def __init__(self) -> None:
        self.layers: list[LayerShape] = []
        self.keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Record the call and return zeros [1, T, Hq, Dv]."""
        self.layers.append(
            LayerShape(
                num_query_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                window=call.window,
                shares_kv_with=self._owner(key, value),
                scale=call.scale,
                softcap=call.softcap,
            )
        )
        self.keys.append(key)
        self._values.append(value)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def _owner(self, key: Tensor, value: Tensor) -> int | None:
        for layer, (earlier_key, earlier_value) in enumerate(zip(self.keys, self._values, strict=True)):
            if (earlier_key.data_ptr(), earlier_value.data_ptr()) == (key.data_ptr(), value.data_ptr()):
                return layer
        return None


def _forward_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the arguments that the model's forward takes.

    Raises:
        UnsupportedError: positions cannot be given, so that sequences cannot be packed.
    """
    names = frozenset(inspect.signature(model.forward).parameters)
    if "position_ids" not in names:
        raise UnsupportedError(f"{model.config.model_type} takes no position_ids; sequences cannot be packed")
    return names


def _current_implementations(model: PreTrainedModel) -> dict[str, str]:
    """Return the attention implementation of the model ("") and of each of its sub-models, by name."""
    current = {"": model.config._attn_implementation}
    if current[""] == IMPLEMENTATION:
        raise UnsupportedError("this model is attached to kvatlas already; call kvatlas.detach(model) first")
    for key in model.config.sub_configs:
        part = getattr(model.config, key, None)
        if part is not None:
            current[key] = part._attn_implementation
    return current
