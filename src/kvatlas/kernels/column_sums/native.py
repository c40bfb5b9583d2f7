"""Column sums by the native CPU kernel: scores become weights and sums in registers, nothing is gathered or stored.

The kernel is ``src/native/kernels/column_sums.cpp``. Keys are decoded once for all queries and take the type of the
queries, as in chunk attention; products and sums are float32. Every sum belongs to one thread, so results do not
depend on how many there are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from kvatlas.core.observer import SpanKind, current_observer
from kvatlas.kernels.abi import FLOAT_TYPES, NONE, pack_parts
from kvatlas.kernels.native import Library, check, library, num_threads
from kvatlas.kernels.pool import Part

LARGEST_HEAD_DIM = 256
_NAME = "kva_column_sums"
_CALL = struct.Struct("@PqqPqqPPPqqqiiiiiiiff")  # struct kva_columns


def covers(q: Tensor) -> bool:
    """Whether the kernel knows the type and the width of these queries, and where they lie."""
    return q.dtype in FLOAT_TYPES and q.device.type == "cpu" and q.shape[-1] <= LARGEST_HEAD_DIM


def column_sums(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    past: Sequence[Part],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    reach: tuple[int, int] | None = None,
    tile_slots: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """As :func:`kvatlas.kernels.column_sums.column_sums`; ``tile_slots`` has no meaning here."""
    (T, Hq, D), H = q.shape, k.shape[1]
    q, k = _rows(q), _rows(k.to(q.dtype))
    lse, positions = lse.float().contiguous(), positions.int().contiguous()
    sums = [torch.empty(H, part.table.shape[-1] * part.pool.layout.block_size) for part in past]
    own = torch.empty(H, T)
    packed, _kept = pack_parts(past, mass=sums)
    call = _CALL.pack(
        q.data_ptr(),
        *q.stride()[:2],
        k.data_ptr(),
        *k.stride()[:2],
        positions.data_ptr(),
        lse.data_ptr(),
        own.data_ptr(),
        NONE if window is None else window,
        *(reach or (0, NONE)),
        FLOAT_TYPES[q.dtype],
        T,
        Hq,
        H,
        D,
        len(past),
        num_threads(),
        scale,
        softcap or 0.0,
    )
    kernel = _kernel()
    with current_observer().span(SpanKind.NATIVE, name=_NAME):
        code = kernel(call, packed)
    if code:
        check(code, _NAME)
    return sums, own


@cache
def _kernel() -> Callable[..., int]:
    found = library()
    assert isinstance(found, Library)
    return found.function(_NAME)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
