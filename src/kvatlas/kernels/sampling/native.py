"""Drawing tokens by the native CPU kernel: what is kept is found by counting, nothing is sorted.

The kernel is ``src/native/kernels/sampling.cpp``. Weights are float32, sums of them double.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kvatlas.core.observer import SpanKind, current_observer
from kvatlas.kernels.native import Library, check, library, num_threads

_NAME = "kva_draw"
_CALL = struct.Struct("@PqPPPPPqqi")  # struct kva_draw


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """As :func:`kvatlas.kernels.sampling.draw`."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    token = torch.empty(len(logits), dtype=torch.int64)
    options = temperature.contiguous(), top_k.contiguous(), top_p.contiguous(), uniform.contiguous()
    call = _CALL.pack(
        logits.data_ptr(), logits.stride(0), *(each.data_ptr() for each in options), token.data_ptr(), *logits.shape,
        num_threads(),
    )  # fmt: skip
    with current_observer().span(SpanKind.NATIVE, name=_NAME):
        code = _kernel()(call)
    if code:
        check(code, _NAME)
    return token


@cache
def _kernel() -> Callable[..., int]:
    found = library()
    assert isinstance(found, Library)
    return found.function(_NAME)
