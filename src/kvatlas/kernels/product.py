"""Products of many float32 rows on the CPU, with what follows them: oneDNN's, as torch carries it.

``torch.nn.functional.linear`` calls MKL for float32, which on AMD's processors is a fifth to a half slower than
oneDNN's kernels, and does not fuse. The operations are those that torch's own compiler emits; they have no public name,
so `available` tries them once and callers keep torch's linear where they are missing.

oneDNN compiles a kernel of about 0.6 MiB for each number of rows and keeps a thousand of them, in no book of ours. The
rows of a prompt's chunk may be any number, so products are made of pieces: powers of two from 64 rows on are oneDNN's,
and what is left, fewer than 64 rows, is torch's linear, which keeps nothing. A number just below a power is padded.
Shapes: K inputs, N outputs; x [..., K], whose rows are all but the last dimension, weight [N, K], bias [N] or None,
result [..., N].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

_LEAST = 64  # rows of oneDNN's smallest piece
_PADDING = 8  # a piece may be padded by this fraction of it
_LOG = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Whether this torch has the operations, and they compute what they should."""
    # Whatever the caller's defaults, modes and random state are: the answer is kept for the process.
    shapes = (_LEAST, 5), (4, 5), (4,), (_LEAST, 4)
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
    return _in_pieces(
        x, weight, lambda rows, _: _unary(rows, weight, bias, "none"), lambda rows, _: linear(rows, weight, bias)
    )


def product_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(x Wᵀ + b)."""
    return _in_pieces(
        x, weight, lambda rows, _: _unary(rows, weight, bias, "swish"), lambda rows, _: silu(linear(rows, weight, bias))
    )


def product_add(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """Return x Wᵀ + b + ``other``, which has the result's shape."""
    return _in_pieces(
        x, weight,
        lambda rows, more: _binary(rows, weight, bias, more, "add"),
        lambda rows, more: linear(rows, weight, bias) + more,
        other,
    )  # fmt: skip


def product_mul(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """Return (x Wᵀ + b) · ``other``, element by element; ``other`` has the result's shape."""
    return _in_pieces(
        x, weight,
        lambda rows, more: _binary(rows, weight, bias, more, "mul"),
        lambda rows, more: linear(rows, weight, bias) * more,
        other,
    )  # fmt: skip


def pieces(rows: int) -> list[int]:
    """Return the sizes of oneDNN's pieces of a product, largest first; the last may be padded beyond the rows."""
    sizes: list[int] = []
    left = rows
    while left >= _LEAST - _LEAST // _PADDING:
        above = 1 << (left - 1).bit_length()
        sizes.append(above if above - left <= above // _PADDING else above // 2)
        left -= sizes[-1]
    return sizes


Piece = Callable[[Tensor, Tensor], Tensor]


def _in_pieces(x: Tensor, weight: Tensor, fast: Piece, plain: Piece, other: Tensor | None = None) -> Tensor:
    """Return the result of ``fast`` over pieces of the rows, and of ``plain`` over the rest.

    Args:
        x: [..., K].
        weight: [N, K].
        fast: oneDNN's product of rows [n, K] and, where it takes one, ``other`` [n, N].
        plain: the same for any number of rows.
        other: [..., N], or None.
    """
    count, shape = x.shape[:-1].numel(), (*x.shape[:-1], len(weight))
    sizes, rows = pieces(count) if weight.numel() else [], x.reshape(count, x.shape[-1])
    others = rows.new_empty(count, 0) if other is None else other.reshape(count, len(weight))
    if sizes == [len(rows)]:
        return fast(rows, others).view(shape)
    result = rows.new_empty(len(rows), len(weight))
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        short = start + size - len(rows)
        if short > 0:
            result[part] = fast(pad(rows[part], (0, 0, 0, short)), pad(others[part], (0, 0, 0, short)))[:-short]
        else:
            result[part] = fast(rows[part], others[part])
        start += size
    if start < len(rows):
        result[start:] = plain(rows[start:], others[start:])
    return result.view(shape)


def _unary(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return result


def _binary(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, then: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, then)
    return result
