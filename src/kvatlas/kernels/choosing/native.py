"""Choosing by the native CPU kernels in ``src/native/kernels/choosing.cpp``: one call instead of a dozen."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kvatlas.kernels.native import Library, check, library

_BEST, _CUT = "kva_choose_best", "kva_cut_blocks"
_BEST_CALL = struct.Struct("@PPPPPqqq")  # struct kva_best
_CUT_CALL = struct.Struct("@PqqPPPPPqqqqqq")  # struct kva_cut


def choose_best(score: Tensor, number: Tensor, always: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.choosing.choose_best`."""
    score, number = score.float().contiguous(), number.contiguous()
    always = None if always is None else always.contiguous()
    index = torch.empty((*score.shape[:2], most), dtype=torch.int64)
    count = torch.empty(score.shape[:2], dtype=torch.int64)
    call = _BEST_CALL.pack(
        score.data_ptr(), number.data_ptr(), 0 if always is None else always.data_ptr(), index.data_ptr(),
        count.data_ptr(), count.numel(), score.shape[-1], most,
    )  # fmt: skip
    code = _kernel(_BEST)(call)
    if code:
        check(code, _BEST)
    return index, count


def cut_blocks(
    table: Tensor, length: Tensor, index: Tensor, count: Tensor, first: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.choosing.cut_blocks`."""
    if table.stride(-1) != 1:
        table = table.contiguous()
    length, index, count = length.contiguous(), index.contiguous(), count.contiguous()
    (rows, heads, columns), number = table.shape, index.shape[-1]
    out, read = torch.empty((rows, heads, number), dtype=torch.int32), torch.empty((rows, heads), dtype=torch.int64)
    call = _CUT_CALL.pack(
        table.data_ptr(), *table.stride()[:2], length.data_ptr(), index.data_ptr(), count.data_ptr(), out.data_ptr(),
        read.data_ptr(), rows, heads, columns, number, first, block_size,
    )  # fmt: skip
    code = _kernel(_CUT)(call)
    if code:
        check(code, _CUT)
    return out, read


@cache
def _kernel(name: str) -> Callable[..., int]:
    found = library()
    assert isinstance(found, Library)
    return found.function(name)
