"""A decoder layer around its attention, in two operations where torch runs twenty-five.

For few rows a step of a small model is dominated not by its weights but by the operations between them. ``queries``
normalises, projects and rotates; ``output`` projects what the queries read, adds, normalises, and runs the gated MLP.
Which layers of a model are of this kind is decided in `kvatlas.models.fast`; what is not stays transformers' own.
Shapes: M rows, C hidden size, I inner size of the MLP, Hq query heads, H KV heads, D elements of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvatlas.kernels.small_linear import LinearWeights


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear: ``weights`` [N, K] and ``bias`` float32 [N], contiguous, or None."""

    weights: LinearWeights
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x²) + eps) · ``weight``, float32 and contiguous."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """What a layer computes with.

    Args:
        q: [Hq * D, C]; ``k`` and ``v`` [H * D, C]; ``o`` [C, Hq * D].
        gate: [I, C], whose SiLU multiplies ``up`` [I, C] before ``down`` [C, I].
        input_norm: [C], before the attention; ``output_norm`` [C], before the MLP.
        query_norm: [D], of every query head before it is rotated, or None; ``key_norm`` likewise.
        num_query_heads: Hq; ``num_kv_heads`` H; ``head_dim`` D, even: element i rotates with element i + D / 2.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    input_norm: Norm
    output_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
