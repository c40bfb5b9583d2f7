"""Blocks read and written by the native kernels; see ``src/native/kernels/blocks.cpp`` and ``bounds.cpp``."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from kvatlas.core.observer import NULL, SpanKind, current_observer
from kvatlas.kernels.abi import FLOAT_TYPES, pack_entries, pool_struct
from kvatlas.kernels.native import Library, check, library, num_threads
from kvatlas.kernels.pool import BlockPool, Entries

_MAX_PACKED_DIM = 1024  # elements of a key or a value that a packed block's codes are unpacked into
_ARGUMENTS = {
    "kva_encode_blocks": (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32),
    "kva_read_blocks": (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int32, c_int32),
    "kva_write_slots": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int32),
    "kva_copy_slots": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
    "kva_score_bounds": (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int32),
}


def covers(pool: BlockPool) -> bool:
    """Whether the kernels can read and write these blocks."""
    layout = pool.layout
    return not layout.format.is_packed or max(layout.key_dim, layout.value_dim) <= _MAX_PACKED_DIM


def write_slots(pool: BlockPool, block: Tensor, offset: Tensor, k: Tensor, v: Tensor | None) -> None:
    """As :func:`kvatlas.kernels.blocks.write_slots`."""
    shape = k.shape[:-1]
    count = width = stride = shape.numel()
    if _are_rows(block, offset, shape):  # as decode steps have them: a layer's lanes among all lanes
        width, stride = shape[1], block.stride(0)
    else:
        block, offset = _indices(block, shape), _indices(offset, shape)
    k = k.contiguous()
    v = None if v is None else v.contiguous()
    _call(
        "kva_write_slots", _of(pool), block.data_ptr(), offset.data_ptr(), count, width, stride,
        k.data_ptr(), 0 if v is None else v.data_ptr(), FLOAT_TYPES[k.dtype],
    )  # fmt: skip


def copy_slots(pool: BlockPool, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """As :func:`kvatlas.kernels.blocks.copy_slots`."""
    shape = target[0].shape
    indices = [_indices(index, shape) for index in (*source, *target)]
    _call("kva_copy_slots", _of(pool), *(index.data_ptr() for index in indices), shape.numel())


def encode_blocks(pool: BlockPool, ids: Tensor, k: Tensor, v: Tensor) -> None:
    """As :func:`kvatlas.kernels.blocks.encode_blocks`."""
    ids, k, v = _indices(ids, ids.shape), k.contiguous(), v.contiguous()
    arguments = ids.data_ptr(), len(ids), k.data_ptr(), v.data_ptr(), FLOAT_TYPES[k.dtype], num_threads()
    _call("kva_encode_blocks", _of(pool), *arguments)


def read_keys(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_keys`."""
    return _read(pool, table, dtype, values=False)


def read_values(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_values`."""
    return _read(pool, table, dtype, values=True)


def score_bounds(q: Tensor, bounds: Entries) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.score_bounds`."""
    R, H, C = bounds.table.shape
    queries = q.float().contiguous()
    packed, kept = pack_entries(bounds)
    scores = torch.empty(R, H, C)
    at = bounds.pool.layout.offset(bounds.name)
    arguments = queries.data_ptr(), R, H, q.shape[1] // H, scores.data_ptr(), num_threads()
    _call("kva_score_bounds", packed, at, *arguments)
    del kept
    return scores


def _read(pool: BlockPool, table: Tensor, dtype: torch.dtype, *, values: bool) -> Tensor:
    width = pool.layout.value_dim if values else pool.layout.key_dim
    slots = table.shape[-1] * pool.layout.block_size
    out = torch.empty(*table.shape[:-1], slots, width, dtype=dtype)
    ids = table.int().contiguous()
    arguments = ids.data_ptr(), ids.numel(), values, out.data_ptr(), FLOAT_TYPES[dtype], num_threads()
    _call("kva_read_blocks", _of(pool), *arguments)
    return out


def _of(pool: BlockPool) -> int:
    return addressof(pool_struct(pool))


def _are_rows(block: Tensor, offset: Tensor, shape: torch.Size) -> bool:
    """Whether block ids and offsets lie alike, as rows of neighbours."""
    return (
        block.dtype is offset.dtype is torch.int64
        and block.shape == offset.shape == shape
        and len(shape) == 2
        and block.stride() == offset.stride()
        and block.stride(1) == 1
    )


def _indices(index: Tensor, shape: torch.Size) -> Tensor:
    """Return block ids or offsets as C reads them, int64 [shape], contiguous: nearly always themselves."""
    return index.long().expand(shape).contiguous()


def _call(name: str, *arguments: object) -> None:
    native = library()
    assert isinstance(native, Library)
    function, observer = _function(native, name), current_observer()
    if observer is NULL:
        code = function(*arguments)
    else:
        with observer.span(SpanKind.NATIVE, name=name):
            code = function(*arguments)
    check(code, name)


@cache
def _function(native: Library, name: str) -> Callable[..., int]:
    function = native.function(name)
    function.argtypes = _ARGUMENTS[name]  # type: ignore[attr-defined]  # ctypes' attributes are untyped
    return function
