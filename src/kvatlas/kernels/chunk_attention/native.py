"""Chunk attention by the native CPU kernel: all chunks of a step in one call, whatever their lengths and formats.

The kernel is ``src/native/kernels/chunk_attention.cpp``. Keys and values are decoded once for many queries and take the
type of the queries; products and sums are float32. Results do not depend on how many threads there are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvatlas.core.observer import SpanKind, current_observer
from kvatlas.kernels.abi import FLOAT_TYPES, NONE, pack_parts
from kvatlas.kernels.native import Library, check, library, num_threads

if TYPE_CHECKING:
    from kvatlas.kernels.chunk_attention import ChunkRows

LARGEST_HEAD_DIM = 256
_NAME = "kva_chunk_attention"
_CALL = struct.Struct("@PqqPqqPqqPPqiiiiiiiff")  # struct kva_chunks
_CHUNK = struct.Struct("@PPqqqqqq")  # struct kva_chunk


def covers(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel knows the type and the width of these queries and values, and where they lie."""
    wide = max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD_DIM
    return q.dtype in FLOAT_TYPES and q.device.type == "cpu" and not wide


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[ChunkRows],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    tile_slots: int = 0,
    need_lse: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """As :func:`kvatlas.kernels.chunk_attention.chunk_attention`; ``tile_slots`` has no meaning here."""
    (T, Hq, Dk), (_, H, Dv) = q.shape, v.shape
    q, k, v = (
        _rows(q),
        _rows(k if k.dtype == q.dtype else k.to(q.dtype)),
        _rows(v if v.dtype == q.dtype else v.to(q.dtype)),
    )
    if sinks is not None:
        sinks = sinks.float().contiguous()
    out = torch.empty(T, Hq, Dv, dtype=q.dtype)
    counts = [chunk.count * Hq for chunk in chunks] if need_lse else []
    lse = torch.split(torch.empty(sum(counts)), counts) if need_lse else (None,) * len(chunks)
    positions = [_int32(chunk.positions) for chunk in chunks]
    packed, _kept = pack_parts([part for chunk in chunks for part in chunk.past])
    described, first = [], 0
    for chunk, its_lse, its_positions in zip(chunks, lse, positions, strict=True):
        described.append(
            _CHUNK.pack(
                its_positions.data_ptr(), 0 if its_lse is None else its_lse.data_ptr(), chunk.start, chunk.count,
                *(chunk.reach or (0, NONE)), first, len(chunk.past),
            )
        )  # fmt: skip
        first += len(chunk.past)
    call = _CALL.pack(
        q.data_ptr(), *q.stride()[:2], k.data_ptr(), *k.stride()[:2], v.data_ptr(), *v.stride()[:2],
        out.data_ptr(), 0 if sinks is None else sinks.data_ptr(), NONE if window is None else window,
        FLOAT_TYPES[q.dtype], Hq, H, Dk, Dv, len(chunks), num_threads(), scale, softcap or 0.0,
    )  # fmt: skip
    kernel = _kernel()
    with current_observer().span(SpanKind.NATIVE, name=_NAME):
        code = kernel(call, b"".join(described), packed)
    if code:
        check(code, _NAME)
    return out, [each.view(Hq, -1) for each in lse if each is not None]


@cache
def _kernel() -> Callable[..., int]:
    found = library()
    assert isinstance(found, Library)
    return found.function(_NAME)


def _int32(positions: Tensor) -> Tensor:
    return positions if positions.dtype == torch.int32 and positions.is_contiguous() else positions.int().contiguous()


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
