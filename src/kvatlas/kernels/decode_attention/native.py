"""Decode attention by the native CPU kernel: one pass over the lanes in any format, nothing gathered.

The kernel is ``src/native/kernels/decode_attention.cpp``. Scores and sums are float32; packed formats round as the
reference does. Work is cut along lanes and, where these are few or unequal, along the context.
Shapes: R sequences, Hq query heads, H KV heads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvatlas.core.observer import NULL, SpanKind, current_observer
from kvatlas.kernels.abi import FLOAT_TYPES, NONE, pack_parts
from kvatlas.kernels.native import Library, check, library, num_threads
from kvatlas.kernels.pool import Credit, Part

_NAME = "kva_decode_attention"
_CALL = struct.Struct("@PqqPPPqiiiiiifff")


def covers(q: Tensor) -> bool:
    """Whether the kernel knows the type of these queries, and where they lie."""
    return q.dtype in FLOAT_TYPES and q.device.type == "cpu"


def decode_attention(
    q: Tensor,
    parts: Sequence[Part],
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_position: Tensor | None,
    slots: Tensor | None,
    need_mass: bool,
    shared: dict[Any, Any] | None,
    credit: Credit | None = None,
) -> tuple[Tensor, list[Tensor] | None]:
    """As :func:`kvatlas.kernels.decode_attention.decode_attention`."""
    (R, Hq, _), H = q.shape, parts[0].table.shape[1]
    if q.stride(2) != 1:
        q = q.contiguous()
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    if window is not None and query_position is not None:
        query_position = query_position.to(torch.int64).contiguous()
    mass = [torch.zeros(R, H, _slots(part, slots)) for part in parts] if need_mass else None
    out = torch.empty(R, Hq, parts[0].pool.layout.value_dim, dtype=q.dtype)
    q_row, q_head, _ = q.stride()
    packed, _kept = pack_parts(parts, slots, mass, None if credit is None else credit.entries)
    call = _CALL.pack(
        q.data_ptr(),
        q_row,
        q_head,
        out.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        0 if query_position is None else query_position.data_ptr(),
        NONE if window is None else window,
        FLOAT_TYPES[q.dtype],
        R,
        Hq,
        H,
        len(parts),
        num_threads(),
        scale,
        softcap or 0.0,
        1.0 if credit is None else credit.factor,
    )
    kernel, observer = _kernel(), current_observer()
    if observer is NULL:
        code = kernel(call, packed)
    else:
        with observer.span(SpanKind.NATIVE, name=_NAME):
            code = kernel(call, packed)
    if code:
        check(code, _NAME)
    return out, mass


@cache
def _kernel() -> Callable[..., int]:
    found = library()
    assert isinstance(found, Library)
    return found.function(_NAME)


def _slots(part: Part, slots: Tensor | None) -> int:
    return part.table.shape[2] * part.pool.layout.block_size if slots is None else slots.shape[2]
