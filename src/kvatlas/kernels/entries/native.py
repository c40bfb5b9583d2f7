"""Products with entries by the native CPU kernel ``src/native/kernels/entries.cpp``: read where they lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvatlas.core.observer import SpanKind, current_observer
from kvatlas.kernels.abi import FLOAT_TYPES
from kvatlas.kernels.entries.torch_path import num_entries
from kvatlas.kernels.native import Library, check, library, num_threads
from kvatlas.kernels.pool import Entries

_NAME = "kva_dot_entries"
_ALIGNED = 16  # floats: a vector of any instruction set
_CALL = struct.Struct("@PPqqPPPqqqqqiiiii")  # struct kva_entries


def covers(q: Tensor, entries: Entries) -> bool:
    """Whether the kernel knows the numbers of these entries, and where they lie."""
    dtype = entries.pool.view(entries.name).dtype
    return dtype in FLOAT_TYPES and q.device.type == "cpu" and entries.table.shape[-1] > 0


def dot_entries(q: Tensor, entries: Entries) -> Tensor:
    """As :func:`kvatlas.kernels.entries.dot_entries`."""
    (R, H, G, width), layout = q.shape, entries.pool.layout
    table = entries.table if entries.table.stride(-1) == 1 else entries.table.contiguous()
    count, query = num_entries(entries).contiguous(), q.float()
    query = pad(query, (0, -width % _ALIGNED)) if width % _ALIGNED else query.contiguous()
    number = layout.entries(entries.name)
    out = torch.empty(R, H, G, table.shape[-1] * number)
    call = _CALL.pack(
        entries.pool.memory.data_ptr(), table.data_ptr(), *table.stride()[:2], count.data_ptr(), query.data_ptr(),
        out.data_ptr(), R, H, table.shape[-1], layout.offset(entries.name), query.shape[-1],
        number, width, G,
        FLOAT_TYPES[entries.pool.view(entries.name).dtype], num_threads(),
    )  # fmt: skip
    with current_observer().span(SpanKind.NATIVE, name=_NAME):
        code = _kernel()(call)
    if code:
        check(code, _NAME)
    return out


@cache
def _kernel() -> Callable[..., int]:
    found = library()
    assert isinstance(found, Library)
    return found.function(_NAME)
