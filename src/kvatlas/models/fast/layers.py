"""Decoder layers that run in two native calls instead of twenty-five torch operations, on the CPU in float32.

A layer is taken over if its class is one of those listed here, whose forward was read, if its parts are of that
family's classes, and if it then computes what the original computes on sample rows: queries, keys, values, output, and
how it asks for attention. Everything else, and every call that brings something unusual, runs as transformers wrote it.
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
from kvatlas.models.fast.linears import SmallLinears, give_back, is_ordinary, is_plain, is_suitable
from kvatlas.models.fast.unchanged import Unchanged, has_hooks

FAMILIES = {
    "transformers.models.llama.modeling_llama": "Llama",
    "transformers.models.mistral.modeling_mistral": "Mistral",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2",
    "transformers.models.qwen3.modeling_qwen3": "Qwen3",
}
"""Module of a family -> prefix of its classes: RMSNorm, attention with rotated halves, residual, RMSNorm, SiLU-gated
MLP, residual."""

_SAMPLE_ROWS = (3, MAX_ROWS + 1)
_TOLERANCE = 1e-4  # of the largest number: float32 sums in another order
_LOG = logging.getLogger(__name__)


class FusedLayers:
    """The decoder layers of a model that run natively.

    Args:
        model: whose layers are replaced; its attention must already be kvatlas'.
        linears: those of the model, whose copies of weights are used. Where they replace nothing because they are
            switched off, no layer is replaced either.
    """

    def __init__(self, model: nn.Module, linears: SmallLinears) -> None:
        self._replaced: list[nn.Module] = []
        if not linears.active or choose(torch.device("cpu"), native=True) != "native":
            return
        try:
            self._replace(model, linears)
        except BaseException:
            self.restore()
            raise
        if self._replaced:
            _LOG.info("%s: %s", type(model).__name__, self)

    @property
    def num_layers(self) -> int:
        """Layers that were replaced."""
        return len(self._replaced)

    def __str__(self) -> str:
        return f"{self.num_layers} native layers" if self._replaced else "transformers' layers"

    def restore(self) -> None:
        """Give the layers their own forward back."""
        for layer in self._replaced:
            give_back(layer, _Fused)
        self._replaced.clear()

    def _replace(self, model: nn.Module, linears: SmallLinears) -> None:
        for layer in _candidates(model):
            fused = _fused(layer, linears)
            if fused is None:
                return self.restore()
            layer.forward = fused  # until restore
            self._replaced.append(layer)
        return None


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if _is_of_family(module, type(module).__module__, "DecoderLayer") and "forward" not in vars(module):
            yield module


def _is_of_family(module: nn.Module, family: str, role: str) -> bool:
    """Whether a module is a family's own layer, attention, MLP or norm, and of no class derived from it."""
    kind = type(module)
    return kind.__module__ == family and kind.__qualname__ == FAMILIES.get(family, "") + role


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
    """Return what a layer computes with; None if a part of it is not what its class builds."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    products = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    products += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    roles = [(attention, "Attention"), (mlp, "MLP"), *((norm, "RMSNorm") for norm in norms)]
    if not all(_is_of_family(part, type(layer).__module__, role) for part, role in roles):
        return None
    if type(mlp.act_fn) is not nn.SiLU and type(mlp.act_fn).__name__ != "SiLUActivation":
        return None
    if any("forward" in vars(part) or has_hooks(part) for part in (attention, mlp, mlp.act_fn, *norms)):
        return None
    made = [_linear(each, linears) for each in products]
    if any(each is None for each in made):
        return None
    q, k, v, o, gate, up, down = (each for each in made if each is not None)
    width, dim = q.weights.codes.shape[1], int(attention.head_dim)
    if not all(
        is_plain(norm.weight) and norm.weight.shape == (size,)
        for norm, size in zip(norms, (width, width, dim, dim), strict=False)
    ):
        return None
    before, after, *heads = (Norm(weight=norm.weight.detach(), eps=norm.variance_epsilon) for norm in norms)
    query_norm, key_norm = heads or (None, None)
    return LayerWeights(
        q=q, k=k, v=v, o=o, gate=gate, up=up, down=down,
        input_norm=before, output_norm=after, query_norm=query_norm, key_norm=key_norm,
        num_query_heads=len(q.weights.codes) // dim, num_kv_heads=len(k.weights.codes) // dim, head_dim=dim,
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
        self._is_unchanged = Unchanged(list(layer.modules())[1:], bypassed=True)
        self._is_unchanged.remember(layer._modules, layer._modules)
        self._is_unchanged.remember(vars(parts.self_attn.config), ["sliding_window"])  # some read it at every call

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = current()
        if forward is None or args or not self._covers(hidden_states, kwargs):
            result: Tensor = self._original(hidden_states, *args, **kwargs)
            return result
        return self.run(forward, hidden_states, *kwargs["position_embeddings"])

    def run(self, forward: Forward, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the layer's output [1, M, C] of its input ``x``; ``cos`` and ``sin`` are [1, M, D]."""
        form = self._native if x.shape[1] <= MAX_ROWS or self._prompt is None else self._prompt
        layer = forward.enter(self._attention)
        if forward.shows is not None:
            normed = self._native.input_norm(x)
            forward.shows(layer, {"hidden_states": normed, "position_embeddings": (cos, sin), "attention_mask": None})
        q, k, v = (heads.transpose(1, 2) for heads in form.queries(x, cos, sin))
        attended = forward.context.attend(self._asked(layer), q, k, v)
        return form.output(x, attended.contiguous())

    def _asked(self, layer: int) -> AttentionCall:
        if self._call.layer != layer:
            self._call = replace(self._call, layer=layer)
        return self._call

    def _covers(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a call is an ordinary one, of modules that nobody has changed."""
        rotation = kwargs.get("position_embeddings")
        return (
            isinstance(rotation, tuple)
            and is_ordinary(x, *rotation)
            and x.dim() == 3
            and x.shape[0] == 1
            and (x.shape[1] <= MAX_ROWS or self._prompt is not None)
            and [each.shape for each in rotation] == [(1, x.shape[1], self._head_dim)] * 2
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
    """Return how a layer asks for attention if its native form computes what it does on sample rows, else None.

    For many rows the native form is that of prompts, where there is one.
    """
    asked: list[AttentionCall] = []
    for rows in _SAMPLE_ROWS:
        x, *rotation = _sample(rows, weights.q.weights.codes.shape[1], weights.head_dim)
        theirs, ours = _Witness([], []), _Witness([], [])
        with running(Forward(context=theirs)), torch.autocast("cpu", enabled=False):
            expected = layer.forward(x, position_embeddings=tuple(rotation))  # no hook of the layer's shall see this
        asked += theirs.calls
        fused = _Fused(layer, weights, asked[0])
        if rows > MAX_ROWS and fused._prompt is None:
            continue
        with running(Forward(context=ours)) as forward, torch.autocast("cpu", enabled=False):
            got = fused.run(forward, x, *rotation)
        if not isinstance(expected, Tensor) or not _agree([*theirs.seen, expected], [*ours.seen, got]):
            _LOG.warning("%s computes something else than expected; it stays transformers'", type(layer).__name__)
            return None
    return asked[0] if all(call == asked[0] for call in asked) else None


def _sample(rows: int, width: int, head_dim: int) -> list[Tensor]:
    """Return an input [1, rows, width], and cosines and sines [1, rows, head_dim] as no rotation has them."""
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randn(1, rows, size, generator=generator, dtype=torch.float32, device="cpu")
        for size in (width, head_dim, head_dim)
    ]


def _agree(expected: list[Tensor], got: list[Tensor]) -> bool:
    if [each.shape for each in expected] != [each.shape for each in got]:
        return False
    return all(bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) for a, b in zip(expected, got, strict=True))
