"""The native small-batch linear; see ``src/native/kernels/small_linear.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvatlas.kernels.abi import FORMATS
from kvatlas.kernels.native import Library, check, library

if TYPE_CHECKING:
    from kvatlas.kernels.small_linear import LinearWeights

_NAME = "kva_small_linear"
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)


class KvaLinear(ctypes.Structure):
    """``kva_linear``."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


def describe(weights: LinearWeights, bias: Tensor | None) -> KvaLinear:
    """Return ``kva_linear`` of weights [N, K] and a bias [N], which must outlive it."""
    num_outputs, num_inputs = weights.codes.shape
    return KvaLinear(
        weights.codes.data_ptr(),
        None if weights.scale is None else weights.scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        num_outputs,
        num_inputs,
        FORMATS[weights.format],
    )


def bind(weights: LinearWeights, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the linear of these weights, with as little as possible left to do in a call.

    It takes contiguous float32 [..., K] in the memory of this process, at most 32 rows, and checks none of that.

    Args:
        weights: [N, K] in the memory of this process; kept alive by what is returned.
        bias: float32 [N], contiguous, or None; likewise.
    """
    found = library()
    assert isinstance(found, Library)
    call = found.function(_NAME)
    call.argtypes = _ARGUMENTS  # type: ignore[attr-defined]  # a ctypes function
    struct, num_outputs = describe(weights, bias), len(weights.codes)
    kept = struct, weights, bias
    address, get_num_threads = ctypes.addressof(struct), torch.get_num_threads

    def linear(x: Tensor, kept: object = kept) -> Tensor:
        shape = x.shape[:-1]
        out = x.new_empty((*shape, num_outputs))
        code = call(address, x.data_ptr(), out.data_ptr(), shape.numel(), get_num_threads())
        if code:
            check(code, _NAME)
        return out

    return linear
