"""Reading and writing the keys and values of blocks in every format, and bounds of keys per block scored.

Whole blocks are encoded at once; single slots are written and copied in formats that give each token bytes of its
own. int8 follows the usual symmetric scale per token; int4 and int2 are KIVI's layout (arXiv:2402.02750): keys per
channel, values per token; bounds are Quest's (arXiv:2406.10774). Encoding needs finite numbers.
Shapes: R sequences, Hq query heads, H KV heads, C table columns, n blocks, s slots of a block, Dk and Dv elements of a
key and a value.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.abi import FLOAT_TYPES
from kvatlas.kernels.blocks import native, reference, torch_path
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.observed import num_blocks, observed, observed_reads
from kvatlas.kernels.pool import TORCH_DTYPES, BlockPool, Entries

__all__ = [
    "copy_slots",
    "encode_blocks",
    "read_keys",
    "read_values",
    "rounded",
    "score_bounds",
    "write_slots",
]

Slots = tuple[Tensor, Tensor]
"""Block ids and offsets in these blocks, two int64 tensors of one shape."""


@observed
def write_slots(pool: BlockPool, block: Tensor, offset: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Write tokens into slots: float formats and int8.

    Args:
        pool: the blocks to write to; positions stay as they are.
        block: [...] int64 block ids.
        offset: [...] int64 slots of these blocks; no slot twice.
        k: [..., Dk] keys, any float type.
        v: [..., Dv] values, or None to leave the values as they are.

    Raises:
        UnsupportedError: a packed format, which is written in whole blocks.
    """
    _refuse_packed(pool)
    _form(pool, k.dtype, None if v is None else v.dtype).write_slots(pool, block, offset, k, v)


@observed
def rounded(x: Tensor, format: Format) -> Tensor:
    """Return keys or values [..., D] as single slots of a format give them back, in a float type.

    Where blocks are packed later, tokens are first stored in another format: ask for that one.
    """
    if format.is_float:
        return x.to(TORCH_DTYPES[format])
    return torch_path.through_int8(x)


@observed
def copy_slots(pool: BlockPool, source: Slots, target: Slots) -> None:
    """Copy keys and values between slots of a pool, scales included; all are read before any is written.

    Args:
        pool: the blocks, float formats and int8; positions stay as they are.
        source: where to read.
        target: where to write; no slot twice.

    Raises:
        UnsupportedError: a packed format, which is written in whole blocks.
    """
    _refuse_packed(pool)
    _form(pool).copy_slots(pool, source, target)


@observed
def encode_blocks(pool: BlockPool, ids: Tensor, k: Tensor, v: Tensor) -> None:
    """Write the keys and values of whole blocks, in any format; positions stay as they are.

    Args:
        pool: the blocks to write to.
        ids: [n] int64 distinct block ids.
        k: [n, s, Dk] keys, any float type. Groups of scales span all s tokens: fill empty slots with a token's copy.
        v: [n, s, Dv] values, likewise.

    Raises:
        ConfigError: keys or values that are not of whole blocks.
    """
    layout = pool.layout
    for name, x, width in (("keys", k, layout.key_dim), ("values", v, layout.value_dim)):
        if x.shape != (len(ids), layout.block_size, width):
            wanted = [len(ids), layout.block_size, width]
            raise ConfigError(f"{name} of shape {list(x.shape)} do not fill {len(ids)} blocks; expected {wanted}")
    if len(ids):
        _form(pool, k.dtype, v.dtype, triton=True).encode_blocks(pool, ids, k, v)


@observed
def read_keys(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys of every column of a table in table order, a new tensor [..., C * s, Dk].

    Slots without a token come back as they lie in memory: garbage, NaN included.

    Args:
        pool: the blocks, any format.
        table: [..., C] int32 or int64 block ids.
        dtype: float type of the result; codes are decoded in float32 and cast.
    """
    if not table.numel():
        return _no_slots(pool, table, pool.layout.key_dim, dtype)
    result: Tensor = _form(pool, dtype, triton=True).read_keys(pool, table, dtype)
    return result


@observed
def read_values(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of every column of a table [..., C * s, Dv], as :func:`read_keys` does the keys."""
    if not table.numel():
        return _no_slots(pool, table, pool.layout.value_dim, dtype)
    result: Tensor = _form(pool, dtype, triton=True).read_values(pool, table, dtype)
    return result


def _bounds_bytes(q: Tensor, bounds: Entries) -> int:
    """Return the bytes of the bounds that a call reads."""
    return num_blocks(bounds) * bounds.pool.layout.num_bytes(bounds.name)


@observed_reads(_bounds_bytes)
def score_bounds(q: Tensor, bounds: Entries) -> Tensor:
    """Return an upper bound of q . k over the tokens of each block, float32 [R, H, C].

    It is the sum over channels of max(q * minimum, q * maximum), and of the query heads of a KV head the largest.
    Columns past the length of the lane, and blocks whose minima exceed their maxima, give -inf.

    Args:
        q: [R, Hq, Dk] queries; query head i reads KV head i // (Hq / H).
        bounds: per block the minima, then the maxima of the key channels, float32 [2 * Dk].
    """
    if not bounds.table.numel():
        return q.new_empty(bounds.table.shape, dtype=torch.float32)
    path = choose(q.device, native=True, triton=True)
    result: Tensor = _module(path).score_bounds(q, bounds)
    return result


def _form(
    pool: BlockPool, dtype: torch.dtype | None = None, other: torch.dtype | None = None, *, triton: bool = False
) -> ModuleType:
    """Return the form to use for numbers of these types to read or to write; ``triton``: there is one in Triton."""
    same = other is None or other == dtype
    known = same and (dtype is None or dtype in FLOAT_TYPES)
    return _module(choose(pool.device, native=known and native.covers(pool), triton=known and triton))


def _module(path: str) -> ModuleType:
    if path == "triton":
        from kvatlas.kernels.blocks import triton_path  # needs the package triton

        return triton_path
    if path == "native":
        return native
    return reference if path == "reference" else torch_path


def _no_slots(pool: BlockPool, table: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    slots = table.shape[-1] * pool.layout.block_size
    return torch.empty(*table.shape[:-1], slots, width, dtype=dtype, device=pool.device)


def _refuse_packed(pool: BlockPool) -> None:
    if pool.layout.format.is_packed:
        raise UnsupportedError(
            f"{pool.layout.format.value} blocks are written whole, not slot by slot; use encode_blocks"
        )
