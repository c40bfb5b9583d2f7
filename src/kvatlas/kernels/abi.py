"""The C structs of ``src/native/abi.h``, filled from pools and parts.

Structs that change with every call are packed into bytes, which costs a third of filling ctypes structures; a bytes
object is passed where C wants a pointer to it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvatlas.core.vocabulary import Format
from kvatlas.kernels.pool import BlockPool, Entries, Part

FORMATS = {Format.FP32: 0, Format.BF16: 1, Format.FP16: 2, Format.INT8: 3, Format.INT4: 4, Format.INT2: 5}
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NONE = -1
"""An offset, a window or a first position that is not there."""
_PART = struct.Struct("@PPqqPqqiiPqqqPqPPqqq")


class KvaPool(ctypes.Structure):
    """``kva_pool``."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("key_dim", ctypes.c_int32),
        ("value_dim", ctypes.c_int32),
        ("values_at", ctypes.c_int32),
        ("key_params_at", ctypes.c_int32),
        ("value_params_at", ctypes.c_int32),
        ("positions_at", ctypes.c_int32),
    )


_pools: WeakKeyDictionary[BlockPool, KvaPool] = WeakKeyDictionary()


def pool_struct(pool: BlockPool) -> KvaPool:
    """Return the ``kva_pool`` of a pool in the memory of this process: made once, valid as long as the pool is."""
    known = _pools.get(pool)
    if known is None:
        known = _pools[pool] = _describe(pool)
    return known


def pack_parts(
    parts: Sequence[Part],
    slots: Tensor | None = None,
    mass: Sequence[Tensor] | None = None,
    credit: Sequence[Entries] | None = None,
) -> tuple[bytes, object]:
    """Return an array of ``kva_part``, and what must be kept alive until C has read it.

    Args:
        parts: tables [R, H, C], lengths [R, H]; or [H, C] and [H], of one sequence.
        slots: [R, H, S'] int32 slots of the only part, or None.
        mass: [R, H, S], or [H, S], float32, contiguous, per part; or None.
        credit: where mass is added, per part: a float32 per slot; or None.
    """
    kept = [_plain(part) for part in parts]
    chosen = None if slots is None else _rows(slots, torch.int32)
    beside = None if credit is None else [(each, _rows(each.table, torch.int32)) for each in credit]
    packed = b"".join(
        _pack(part, chosen, None if mass is None else mass[i], _NO_CREDIT if beside is None else _credit(*beside[i]))
        for i, part in enumerate(kept)
    )
    return packed, (kept, chosen, beside)


_NO_CREDIT = (0, 0, 0, 0, 0)


def _credit(entries: Entries, table: Tensor) -> tuple[int, int, int, int, int]:
    layout, (row, lane, _) = entries.pool.layout, table.stride()
    return entries.pool.memory.data_ptr(), table.data_ptr(), row, lane, layout.offset(entries.name)


def pack_entries(entries: Entries) -> tuple[bytes, object]:
    """Return a ``kva_part`` over blocks of streams, and what must be kept alive until C has read it.

    Of its pool mean something: the memory, the slots of a block, and as elements of a key half of an entry's.
    """
    pool = entries.pool
    described = KvaPool(
        memory=pool.memory.data_ptr(),
        bytes=pool.memory.numel(),
        block_size=pool.layout.block_size,
        key_dim=pool.layout.stream(entries.name).width // 2,
    )
    table, length = _rows(entries.table, torch.int32), entries.length.long()
    packed = _PART.pack(
        ctypes.addressof(described), table.data_ptr(), *table.stride()[:2], length.data_ptr(), *length.stride(),
        table.shape[2], 0, 0, 0, 0, NONE, 0, 0, *_NO_CREDIT,
    )  # fmt: skip
    return packed, (described, table, length)


def _pack(part: Part, slots: Tensor | None, mass: Tensor | None, credit: tuple[int, int, int, int, int]) -> bytes:
    table, length = part.table, part.length
    table_row, table_lane, _ = table.stride() if table.dim() == 3 else (0, *table.stride())
    length_row, length_lane = length.stride() if length.dim() == 2 else (0, *length.stride())
    slots_row, slots_lane = (0, 0) if slots is None else slots.stride()[:2]
    return _PART.pack(
        ctypes.addressof(pool_struct(part.pool)),
        table.data_ptr(),
        table_row,
        table_lane,
        length.data_ptr(),
        length_row,
        length_lane,
        table.shape[-1],
        part.hide_empty,
        0 if slots is None else slots.data_ptr(),
        slots_row,
        slots_lane,
        NONE if part.dense_start is None else part.dense_start,
        0 if mass is None else mass.data_ptr(),
        0 if mass is None else mass.shape[-1],
        *credit,
    )


def _plain(part: Part) -> Part:
    """Return the part with tensors of the types and strides that C reads: nearly always itself."""
    table, length = _rows(part.table, torch.int32), part.length
    if length.dtype != torch.int64:
        length = length.long()
    return part if table is part.table and length is part.length else replace(part, table=table, length=length)


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in ``dtype`` with a contiguous last dimension."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _describe(pool: BlockPool) -> KvaPool:
    layout = pool.layout
    return KvaPool(
        memory=pool.memory.data_ptr(),
        bytes=pool.memory.numel(),
        format=FORMATS[layout.format],
        block_size=layout.block_size,
        key_dim=layout.key_dim,
        value_dim=layout.value_dim,
        values_at=layout.key_bytes,
        key_params_at=NONE if layout.format.is_float else layout.key_params_offset,
        value_params_at=NONE if layout.format.is_float else layout.value_params_offset,
        positions_at=layout.positions_offset if layout.positions else NONE,
    )
