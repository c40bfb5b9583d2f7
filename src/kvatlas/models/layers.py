"""Decoder layers that run in two native calls instead of twenty-five torch operations, on the CPU in float32.

A layer is taken over if its class is one of those listed here, whose forward was read, and if it then computes what the
original computes on sample rows: queries, keys, values, output, and how it asks for attention. Everything else, and
every call that brings something unusual, runs as transformers wrote it.
Shapes: M packed rows, C hidden size, Hq query heads, H KV heads, D elements of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvatlas.core.vocabulary import Format
from kvatlas.kernels import product
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.layer import LayerWeights, Linear, Norm
from kvatlas.kernels.layer.native import NativeLayer
from kvatlas.kernels.small_linear import MAX_ROWS, encode
from kvatlas.models.attention import HARMLESS, AttentionCall, Forward, current, running
from kvatlas.models.linear import SmallLinears, is_plain, is_suitable
from kvatlas.models.unchanged import Unchanged, has_hooks

KINDS = (
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer",
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
)
"""RMSNorm, attention with rotated halves, residual, RMSNorm, SiLU-gated MLP, residual."""

_PARTS = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
_SAMPLE_ROWS = (3, MAX_ROWS + 1)
_TOLERANCE = 1e-4  # of the largest number: float32 sums in another order
_LOG = logging.getLogger(__name__)


class FusedLayers:
    """The decoder layers of a model that run natively.

    Args:
        model: whose layers are replaced; its attention must already be kvatlas'.
        linears: those of the model, whose copies of weights are used. Where they replace nothing because they are
            switched off, no layer is replaced either.

    Attributes:
        count: layers that were replaced.
    """

    def __init__(self, model: nn.Module, linears: SmallLinears) -> None:
        self._replaced: list[nn.Module] = []
        if not linears.active or choose(torch.device("cpu"), native=True) != "native":
            return
        for layer in _candidates(model):
            fused = _fused(layer, linears)
            if fused is None:
                self.restore()
                return
            layer.forward = fused  # until restore
            self._replaced.append(layer)
        if self._replaced:
            _LOG.info("%s: %s", type(model).__name__, self)

    @property
    def count(self) -> int:
        """Layers that were replaced."""
        return len(self._replaced)

    def __str__(self) -> str:
        return f"{self.count} native layers" if self._replaced else "transformers' layers"

    def restore(self) -> None:
        """Give the layers their own forward back."""
        for layer in self._replaced:
            vars(layer).pop("forward", None)
        self._replaced.clear()


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" in KINDS and "forward" not in vars(module):
            yield module


def _fused(layer: nn.Module, linears: SmallLinears) -> _Fused | None:
    """Return a layer's native forward, or None if it is not the layer that its class promises."""
    try:
        weights = _weights(layer, linears)
        asked = None if weights is None else _trial(layer, weights)
    except Exception as error:  # whatever somebody made of a layer, the model must load and run as it is
        _LOG.warning("%s stays transformers': %s: %s", type(layer).__name__, type(error).__name__, error)
        return None
    return None if weights is None or asked is None else _Fused(layer, weights, asked)


def _weights(layer: Any, linears: SmallLinears) -> LayerWeights | None:
    """Return what a layer computes with; None if a part of it does more than its class does."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    products = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    products += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        return None
    if any("forward" in vars(part) or has_hooks(part) for part in (attention, mlp, mlp.act_fn, *norms)):
        return None
    if not all(is_plain(norm.weight) for norm in norms):
        return None
    made = [_linear(each, linears) for each in products]
    if any(each is None for each in made):
        return None
    q, k, v, o, gate, up, down = (each for each in made if each is not None)
    before, after, *heads = (Norm(weight=norm.weight.detach(), eps=norm.variance_epsilon) for norm in norms)
    query_norm, key_norm = heads or (None, None)
    dim = int(attention.head_dim)
    return LayerWeights(
        q=q, k=k, v=v, o=o, gate=gate, up=up, down=down,
        input_norm=before, output_norm=after, query_norm=query_norm, key_norm=key_norm,
        query_heads=attention.q_proj.out_features // dim, kv_heads=attention.k_proj.out_features // dim, head_dim=dim,
    )  # fmt: skip


def _linear(module: nn.Linear, linears: SmallLinears) -> Linear | None:
    weights = linears.weights_of(module)
    if weights is None:
        if not is_suitable(module):
            return None
        weights = encode(module.weight, Format.FP32)
    return Linear(weights=weights, bias=None if module.bias is None else module.bias.detach())


class _Fused:
    """The forward of a layer."""

    def __init__(self, layer: nn.Module, weights: LayerWeights, call: AttentionCall) -> None:
        parts: Any = layer
        self._layer = layer
        self._original = layer.forward
        self._attention = parts.self_attn
        self._native = NativeLayer(weights)
        self._prompt = _Prompt(layer, self._native) if product.available() else None
        self._call = call
        self._head_dim = weights.head_dim
        submodules = [module for part in _PARTS for module in getattr(layer, part).modules()]
        self._is_unchanged = Unchanged(submodules, bypassed=True)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = current()
        if forward is None or args or not self._covers(hidden_states, kwargs):
            result: Tensor = self._original(hidden_states, *args, **kwargs)
            return result
        cos, sin = kwargs["position_embeddings"]
        few = hidden_states.shape[1] <= MAX_ROWS
        form = self._native if few or self._prompt is None else self._prompt
        q, k, v = (heads.transpose(1, 2) for heads in form.queries(hidden_states, cos, sin))
        attended = forward.context.attend(self._asked(forward.enter(self._attention)), q, k, v)
        return form.output(hidden_states, attended.contiguous())

    def _asked(self, layer: int) -> AttentionCall:
        if self._call.layer != layer:
            self._call = replace(self._call, layer=layer)
        return self._call

    def _covers(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a call is an ordinary one, of modules that nobody has changed."""
        rotation = kwargs.get("position_embeddings")
        return (
            _is_plain(x)
            and x.dim() == 3
            and x.shape[0] == 1
            and (x.shape[1] <= MAX_ROWS or self._prompt is not None)
            and isinstance(rotation, tuple)
            and all(_is_plain(each) and each.shape == (1, x.shape[1], self._head_dim) for each in rotation)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and all(value is None or name in HARMLESS for name, value in kwargs.items())
            and self._is_unchanged()
        )

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of the layer, pickled or deep, computes as transformers wrote it."""
        return partial, (type(self._layer).forward, self._layer)


class _Prompt:
    """A layer of many rows: native norms and rotation, products that add, multiply and activate as they go."""

    def __init__(self, layer: Any, native: NativeLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._native = native
        self._q, self._k, self._v, self._o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self._gate, self._up, self._down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self._head_dim = int(attention.head_dim)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `NativeLayer.queries`."""
        normed = self._native.input_norm(x)
        q, k, v = (product.product(normed, each.weight, each.bias) for each in (self._q, self._k, self._v))
        self._native.turn_heads(q, k, cos, sin)
        q, k, v = (each.view(1, x.shape[1], -1, self._head_dim) for each in (q, k, v))
        return q, k, v

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """As `NativeLayer.output`."""
        hidden = product.product_add(attended.flatten(2), self._o.weight, self._o.bias, x)
        normed = self._native.output_norm(hidden)
        gate = product.product_silu(normed, self._gate.weight, self._gate.bias)
        inner = product.product_mul(normed, self._up.weight, self._up.bias, gate)
        return product.product_add(inner, self._down.weight, self._down.bias, hidden)


def _is_plain(x: object) -> bool:
    return type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()


@dataclass
class _Witness:
    """An attention context that notes what it is asked and answers with something of its own."""

    calls: list[AttentionCall]
    seen: list[Tensor]

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the queries plus their heads' values, [1, M, Hq, D]."""
        self.calls.append(call)
        self.seen += [query, key, value]
        return (query + value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)).transpose(1, 2)


@torch.inference_mode()
def _trial(layer: nn.Module, weights: LayerWeights) -> AttentionCall | None:
    """Return how a layer asks for attention if its native form computes what it does on sample rows, else None."""
    parts: Any = layer
    width, generator = parts.self_attn.q_proj.in_features, torch.Generator().manual_seed(0)
    asked: list[AttentionCall] = []
    for rows in _SAMPLE_ROWS:
        x = torch.randn(1, rows, width, generator=generator)
        rotation = tuple(torch.randn(1, rows, weights.head_dim, generator=generator) for _ in range(2))
        theirs, ours = _Witness([], []), _Witness([], [])
        with running(Forward(context=theirs)):
            expected = layer(x, position_embeddings=rotation)
        fused = _Fused(layer, weights, theirs.calls[0])
        with running(Forward(context=ours)):
            got = fused(x, position_embeddings=rotation)
        asked += theirs.calls
        if not isinstance(expected, Tensor) or not _agree([*theirs.seen, expected], [*ours.seen, got]):
            _LOG.warning("%s computes something else than expected; it stays transformers'", type(layer).__name__)
            return None
    return asked[0] if all(call == asked[0] for call in asked) else None


def _agree(expected: list[Tensor], got: list[Tensor]) -> bool:
    if [each.shape for each in expected] != [each.shape for each in got]:
        return False
    return all(bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) for a, b in zip(expected, got, strict=True))
