"""A linear for few rows, whose time is that of reading the weights; these may be kept in fewer bits than float32.

torch's linear multiplies float32 with float32. For one row it reads at memory speed, for a handful of rows it does not;
here both do, and weights of 16 or 8 bits are read in a half or a quarter of the time. A 16-bit copy of weights that it
represents exactly, as those of nearly all published checkpoints, changes no weight and so only the order of sums.
Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvatlas.core.errors import UnsupportedError
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.small_linear import native, reference

MAX_ROWS = 32
"""Rows up to which reading the weights is what counts."""
FORMATS = (Format.FP32, Format.BF16, Format.FP16, Format.INT8)

_DTYPES = {Format.FP32: torch.float32, Format.BF16: torch.bfloat16, Format.FP16: torch.float16, Format.INT8: torch.int8}
_CHUNK_ELEMENTS = 1 << 22  # converted at once, so that temporaries stay small beside the weights
_INT8_LEVELS = 127


@dataclass(frozen=True, kw_only=True)
class LinearWeights:
    """The weights of a linear as they are kept.

    Args:
        format: how.
        codes: [N, K], contiguous, in the type of the format.
        scale: float32 [N], what a code of ``int8`` is worth in each row; None for floats.
    """

    format: Format
    codes: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)


def exact_format(weight: Tensor) -> Format:
    """Return the smallest format that holds every weight exactly: ``bf16``, ``fp16`` or else ``fp32``.

    Args:
        weight: float32 [N, K]; one with NaN stays ``fp32``.
    """
    for format in (Format.BF16, Format.FP16):
        if all(torch.equal(part.to(_DTYPES[format]).float(), part) for part in _chunks(weight)):
            return format
    return Format.FP32


def encode(weight: Tensor, format: Format) -> LinearWeights:
    """Return weights in a format, rounded to the nearest; ``fp32`` shares the memory of ``weight``.

    ``int8`` has one scale per row, max|w| / 127.

    Args:
        weight: float32 [N, K], contiguous.
        format: one of ``FORMATS``.

    Raises:
        UnsupportedError: a finite weight is too large for the format, or ``int8`` is to hold NaN or infinity.
    """
    if format is Format.FP32:
        return LinearWeights(format=format, codes=weight.detach())
    codes = torch.empty(weight.shape, dtype=_DTYPES[format], device=weight.device)
    if format is Format.INT8:
        return LinearWeights(format=format, codes=codes, scale=_encode_int8(weight.detach(), codes))
    for part, target in zip(_chunks(weight), _chunks(codes), strict=True):
        target.copy_(part)
        if not torch.equal(target.isfinite(), part.isfinite()):
            raise UnsupportedError(
                f"a weight of {float(part.abs().max()):g} does not fit into {format}; use bf16 or fp32"
            )
    return LinearWeights(format=format, codes=codes)


def decode(weights: LinearWeights, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what weights are worth, [N, K] in ``dtype``."""
    values = weights.codes.to(dtype)
    return values if weights.scale is None else values * weights.scale[:, None].to(dtype)


def small_linear(x: Tensor, weights: LinearWeights, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, float32 [..., N]; its last bit does not depend on how many rows come together.

    Args:
        x: float32 [..., K], at most ``MAX_ROWS`` rows in all.
        weights: [N, K].
        bias: float32 [N], contiguous, or None.

    Raises:
        UnsupportedError: too many rows, or another type of numbers.
    """
    rows = x.shape[:-1].numel()
    if rows > MAX_ROWS or x.dtype != torch.float32:
        raise UnsupportedError(
            f"a small linear takes up to {MAX_ROWS} rows of float32, got {rows} of {x.dtype}; use torch's linear"
        )
    path = choose(x.device, native=True)
    if path == "reference":
        return reference.small_linear(x, decode(weights, torch.float64), bias)
    if path == "native":
        return native.bind(weights, bias)(x.contiguous())
    return linear(x, decode(weights), bias)


def _encode_int8(weight: Tensor, codes: Tensor) -> Tensor:
    scale = torch.empty(len(weight), device=weight.device)
    for part, target, scales in zip(_chunks(weight), _chunks(codes), _chunks(scale, weight.shape[1]), strict=True):
        largest = part.abs().amax(dim=1) if part.shape[1] else scales.new_zeros(len(part))
        if not bool(largest.isfinite().all()):
            raise UnsupportedError("int8 cannot hold weights that are NaN or infinite; use bf16 or fp32")
        scales.copy_(largest / _INT8_LEVELS)
        divisor = torch.where(scales > 0, scales, 1.0)[:, None]
        target.copy_((part / divisor).round_().clamp_(-_INT8_LEVELS, _INT8_LEVELS))
    return scale


def _chunks(weight: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    width = weight.shape[1] if width is None else width
    return torch.split(weight.detach(), max(1, _CHUNK_ELEMENTS // max(1, width)))
