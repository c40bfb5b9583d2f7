"""Column sums on NVIDIA GPUs: one program per head and run of keys; see ``triton_kernels``.

Keys are decoded once per program and take the type of the queries; sums are float32. No atomics: a run's sums belong
to one program, so results do not depend on scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kvatlas.core.layout import GRANULE
from kvatlas.kernels.column_sums.triton_kernels import sum_columns
from kvatlas.kernels.pool import Part
from kvatlas.kernels.triton_support import inner_contiguous, power_of_two, typed_elements

LARGEST_HEAD_DIM = 256
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def why_not(q: Tensor) -> str | None:
    """Return what this form does not cover about a call, or None."""
    if q.dtype not in _TYPES:
        return f"queries of {q.dtype}"
    if q.dtype == torch.float32 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
        return "queries of float32, whose products in three parts do not fit into registers below sm_90"
    return f"heads of more than {LARGEST_HEAD_DIM} elements" if q.shape[-1] > LARGEST_HEAD_DIM else None


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
    T, Hq, DK = q.shape
    H = k.shape[1]
    q, k, lse, positions = q.contiguous(), k.to(q.dtype).contiguous(), lse.contiguous(), positions.contiguous()
    numbers = (scale, softcap or 0.0, window or 0, *(reach or (0, 0)))
    flags: dict[str, Any] = {
        "H": H,
        "G": Hq // H,
        "WINDOW": window is not None,
        "REACH": reach is not None,
        "SOFTCAP": softcap is not None,
    } | tile_constants(q.dtype, DK)

    def launch(part: Part | None, num_slots: int) -> Tensor:
        sums = torch.empty(H, num_slots, dtype=torch.float32, device=q.device)
        if not num_slots:
            return sums
        tensors, start, stride = (k, q, positions, positions, positions), 0, 0
        if part is not None:
            memory, table = part.pool.memory, inner_contiguous(part.table)
            params = memory if part.pool.layout.format.is_float else memory.view(torch.float16)
            tensors = (typed_elements(part.pool), params, memory.view(torch.int32), table, part.length.contiguous())
            start, stride = part.dense_start or 0, table.stride(0)
        grid = (H, -(-num_slots // flags["N"]))
        launch_constants = flags | source_constants(part, DK)
        sum_columns[grid](q, lse, positions, *tensors, sums, *numbers, start, T, num_slots, stride, **launch_constants)
        return sums

    sums = [launch(part, part.table.shape[-1] * part.pool.layout.block_size) for part in past]
    return sums, launch(None, T)


def tile_constants(dtype: torch.dtype, key_dim: int) -> dict[str, Any]:
    """Return the sizes and types of the kernel's tiles, and how it is to be scheduled."""
    wide = dtype.itemsize * key_dim > 256
    return {
        "DOT": _TYPES[dtype],
        "DKP": power_of_two(key_dim, 16),
        "N": 64,
        "M": 32 if wide else 64,
        "num_warps": 4,
        "num_stages": 2,
    }


def source_constants(part: Part | None, key_dim: int) -> dict[str, Any]:
    """Return where the keys lie: in a part's blocks, or, if None, in the chunk."""
    constants = {"DK": key_dim, "OWN": part is None, "DENSE": part is not None and part.dense_start is not None}
    if part is None:
        return constants | {"BITS": 32, "S": 1, "GRANULE": 1, "KP_OFFSET": 0, "POSITION_OFFSET": 0}
    layout = part.pool.layout
    has_positions = layout.positions
    return constants | {
        "BITS": layout.format.bits,
        "S": layout.block_size,
        "GRANULE": GRANULE if layout.format.is_packed else GRANULE // layout.format.element_bytes,
        "KP_OFFSET": layout.key_params_offset // 2,
        "POSITION_OFFSET": layout.positions_offset // 4 if has_positions else 0,
    }
