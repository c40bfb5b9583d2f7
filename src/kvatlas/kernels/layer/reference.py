"""A decoder layer around its attention in float64, one operation at a time: the meaning of the native form."""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.kernels.layer import LayerWeights, Linear, Norm
from kvatlas.kernels.small_linear import decode


def queries(layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [M, Hq, D], k and v [M, H, D], float32, of ``x`` [M, C]; ``cos`` and ``sin`` are [M, D]."""
    normed = norm(layer.input_norm, x.double())
    q, k, v = (_heads(_product(each, normed), layer) for each in (layer.q, layer.k, layer.v))
    q = _rotate(norm(layer.query_norm, q), cos, sin)
    k = _rotate(norm(layer.key_norm, k), cos, sin)
    return q.float(), k.float(), v.float()


def output(layer: LayerWeights, x: Tensor, attended: Tensor) -> Tensor:
    """Return float32 [M, C] of the layer's input ``x`` [M, C] and what its queries read, [M, Hq, D]."""
    hidden = x.double() + _product(layer.o, attended.double().flatten(1))
    normed = norm(layer.output_norm, hidden)
    gate = _product(layer.gate, normed)
    inner = gate * torch.sigmoid(gate) * _product(layer.up, normed)
    return (hidden + _product(layer.down, inner)).float()


def norm(norm: Norm | None, x: Tensor) -> Tensor:
    """Return ``x`` [..., N], normalised over the last dimension in its own dtype; as it is without a norm."""
    if norm is None:
        return x
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight.to(x.dtype)


def _product(linear: Linear, x: Tensor) -> Tensor:
    product = x @ decode(linear.weights, torch.float64).T
    return product if linear.bias is None else product + linear.bias.double()


def _heads(x: Tensor, layer: LayerWeights) -> Tensor:
    return x.view(*x.shape[:-1], x.shape[-1] // layer.head_dim, layer.head_dim)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos.double()[:, None] + torch.cat((-second, first), dim=-1) * sin.double()[:, None]
