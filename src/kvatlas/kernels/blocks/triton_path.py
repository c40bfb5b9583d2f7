"""Encoding, decoding and scoring of whole blocks on NVIDIA GPUs; single slots are written and copied by torch.

Codes and scales are bit for bit those of the reference: divisions are exact and rounding is half to even.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvatlas.core.layout import GRANULE, GROUP
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks.triton_kernels import bound_scores, copy_words, decode_blocks, encode_groups, encode_tokens
from kvatlas.kernels.pool import BlockPool, Entries
from kvatlas.kernels.triton_support import inner_contiguous, power_of_two, typed_elements

_COLUMNS = 16
_WORDS = 1024
_QUADS_OF_TOKENS = 8


def encode_blocks(pool: BlockPool, ids: Tensor, k: Tensor, v: Tensor) -> None:
    """As :func:`kvatlas.kernels.blocks.encode_blocks`."""
    if not len(ids):
        return
    for values, x in ((False, k), (True, v)):
        width = x.shape[-1]
        if width:
            encode, constants = encoder(pool, values)
            groups = -(-width // GROUP) if values and pool.layout.format.is_packed else 1
            memory = pool.memory.view(torch.int32) if pool.layout.format.is_packed else typed_elements(pool)
            encode[(len(ids), groups)](x.contiguous(), memory, _params(pool), ids, **constants)


def read_keys(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_keys`."""
    return _read(pool, table, dtype, values=False)


def read_values(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_values`."""
    return _read(pool, table, dtype, values=True)


def score_bounds(q: Tensor, bounds: Entries) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.score_bounds`."""
    R, H, C = bounds.table.shape
    layout, table, width = bounds.pool.layout, inner_contiguous(bounds.table), q.shape[-1]
    out = torch.empty(R, H, C, dtype=torch.float32, device=q.device)
    if out.numel():
        bound_scores[(R * H, -(-C // _COLUMNS))](
            q.contiguous(),
            bounds.pool.memory.view(torch.float32),
            table,
            bounds.length.contiguous(),
            out,
            C,
            table.stride(0),
            table.stride(1),
            H=H,
            G=q.shape[1] // H,
            DK=width,
            S=layout.block_size,
            BOUND_OFFSET=layout.offset(bounds.name) // 4,
            DP=power_of_two(width),
            C=_COLUMNS,
            num_warps=4,
        )
    return out


def move_rows(source: Tensor, source_ids: Tensor, target: Tensor, target_ids: Tensor, device: torch.device) -> None:
    """Copy whole blocks between the device and page-locked memory of the host, in one launch on the current stream.

    Args:
        source: blocks [N, words] int32, views whose rows are granules apart.
        source_ids: int64 [n] on ``device``.
        target: likewise.
        target_ids: likewise.
        device: the one of the two sides that computes.
    """
    if len(source_ids):
        with torch.cuda.device(device):
            copy_words[(len(source_ids),)](
                source, source_ids, target, target_ids, WORDS=source.shape[1], TILE=_WORDS, num_warps=4
            )


def encoder(pool: BlockPool, values: bool) -> tuple[Any, dict[str, int]]:
    """Return the kernel that encodes a pool's keys or values, and its constants."""
    layout = pool.layout
    width = layout.value_dim if values else layout.key_dim
    offset = layout.key_bytes if values else 0
    p_offset = (layout.value_params_offset if values else layout.key_params_offset) // 2
    if layout.format.is_packed:
        quads = _QUADS_OF_TOKENS if values else power_of_two(-(-width // 4))
        constants = {"WIDTH": width, "BITS": layout.format.bits, "OFFSET": offset // 4, "P_OFFSET": p_offset}
        return encode_groups, constants | {"VALUES": values, "Q": quads, "num_warps": 1 if values else 4}
    size = layout.format.element_bytes
    return encode_tokens, {
        "WIDTH": width,
        "S": layout.block_size,
        "GRANULE": GRANULE // size,
        "OFFSET": offset // size,
        "P_OFFSET": p_offset,
        "INT8": layout.format is Format.INT8,
        "SP": power_of_two(layout.block_size),
        "DP": power_of_two(width),
        "num_warps": 4,
    }


def decoder_constants(pool: BlockPool, values: bool) -> dict[str, int]:
    """Return the constants of the kernel that decodes a pool's keys or values."""
    layout = pool.layout
    size = 1 if layout.format.is_packed else layout.format.element_bytes
    width = layout.value_dim if values else layout.key_dim
    return {
        "WIDTH": width,
        "BITS": layout.format.bits,
        "S": layout.block_size,
        "GRANULE": GRANULE // size,
        "V_OFFSET": layout.key_bytes // size,
        "P_OFFSET": (layout.value_params_offset if values else layout.key_params_offset) // 2,
        "VALUES": values,
        "SP": power_of_two(layout.block_size),
        "DP": power_of_two(width),
        "num_warps": 4,
    }


def _read(pool: BlockPool, table: Tensor, dtype: torch.dtype, *, values: bool) -> Tensor:
    layout = pool.layout
    *lanes, C = table.shape
    width = layout.value_dim if values else layout.key_dim
    out = torch.empty(*lanes, C * layout.block_size, width, dtype=dtype, device=pool.device)
    if out.numel():
        ids = table.reshape(-1).contiguous()
        decode_blocks[(len(ids),)](typed_elements(pool), _params(pool), ids, out, **decoder_constants(pool, values))
    return out


def _params(pool: BlockPool) -> Tensor:
    """Return the memory as float16 where formats have scales; any pointer elsewhere."""
    return pool.memory if pool.layout.format.is_float else pool.memory.view(torch.float16)
