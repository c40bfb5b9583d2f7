"""Products of many float32 rows on the CPU, with what follows them: oneDNN's, as torch carries it.

``torch.nn.functional.linear`` calls MKL for float32, which on AMD's processors is a fifth to a half slower than
oneDNN's kernels, and does not fuse. The operations are those that torch's own compiler emits; they have no public name,
so `available` tries them once and callers keep torch's linear where they are missing.
Shapes: M rows, K inputs, N outputs; x [..., M, K], weight [N, K], bias [N] or None, result [..., M, N].
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

_LOG = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Whether this torch has the operations, and they compute what they should."""
    # Whatever the caller's defaults, modes and random state are: the answer is kept for the process.
    shapes = (3, 5), (4, 5), (4,), (3, 4)
    x, weight, bias, other = (
        torch.linspace(-2, 1, math.prod(shape), dtype=torch.float32, device="cpu").reshape(shape) for shape in shapes
    )
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            plain = linear(x, weight, bias)
            pairs = (
                (product(x, weight, bias), plain),
                (product_silu(x, weight, bias), silu(plain)),
                (product_add(x, weight, bias, other), plain + other),
                (product_mul(x, weight, bias, other), plain * other),
            )
            return all(torch.allclose(got, wanted, atol=1e-5) for got, wanted in pairs)
    except (AttributeError, RuntimeError) as error:
        _LOG.info("torch's linear is used for many rows: %s", error)
        return False


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b."""
    return _unary(x, weight, bias, "none")


def product_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(x Wᵀ + b)."""
    return _unary(x, weight, bias, "swish")


def product_add(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """Return x Wᵀ + b + ``other``, which has the result's shape."""
    return _binary(x, weight, bias, other, "add")


def product_mul(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """Return (x Wᵀ + b) · ``other``, element by element; ``other`` has the result's shape."""
    return _binary(x, weight, bias, other, "mul")


def _unary(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return result


def _binary(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, then: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, then)
    return result
