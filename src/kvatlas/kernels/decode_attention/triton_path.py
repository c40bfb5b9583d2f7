"""Decode attention on NVIDIA GPUs: runs of each lane in parallel, then one merge; see ``triton_float`` and ``_packed``.

Keys and values are read once, in their format; nothing is gathered. Products are of the type of queries and blocks
where they agree, float16 for int8 and packed codes, and float32 by three tf32 products otherwise; sums are float32.
The launch sizes are fixed by shapes, so the compiler sees few variants and a step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kvatlas.core.layout import GRANULE, GROUP
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.decode_attention.triton_float import attend_float
from kvatlas.kernels.decode_attention.triton_merge import merge_runs, sum_mass
from kvatlas.kernels.decode_attention.triton_packed import attend_packed
from kvatlas.kernels.pool import TORCH_DTYPES, Part
from kvatlas.kernels.triton_support import inner_contiguous, num_processors, power_of_two, typed_elements

LARGEST_HEAD_DIM = 256
_SHORTEST_RUN = 256
"""Slots: below this, launching and merging a run costs more than it gains."""
_ROWS = 16
"""Least rows of a tensor core's product."""
_MASS_SLOTS = 512
_MERGED_RUNS = 16
_FLOAT16_SHIFT = 5.0
"""Weights are at most 2 to this power in float16 products: room for small ones, and for scales of values up to 2047."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Schedule:
    """How a kernel is cut and run; ``benchmarks/gpu_decode_attention.py --sweep`` tries others.

    Args:
        slots: slots of a step, where the operands of a slot are at most 256 bytes wide; fewer beyond.
        stages: steps whose loads are under way at once.
        warps: warps of a program.
        programs: programs per multiprocessor to aim at.
    """

    slots: int
    stages: int
    warps: int
    programs: int


SCHEDULES = {
    Format.FP32: Schedule(64, 3, 4, 4),
    Format.BF16: Schedule(64, 3, 4, 4),
    Format.FP16: Schedule(64, 3, 4, 4),
    Format.INT8: Schedule(64, 3, 4, 4),
    Format.INT4: Schedule(64, 3, 2, 8),
    Format.INT2: Schedule(64, 3, 2, 8),
}


def why_not(q: Tensor, parts: Sequence[Part], slots: Tensor | None) -> str | None:
    """Return what this form does not cover about a call, or None."""
    if q.dtype not in _TYPES:
        return f"queries of {q.dtype}"
    for part in parts:
        layout = part.pool.layout
        if max(layout.key_dim, layout.value_dim) > LARGEST_HEAD_DIM:
            return f"heads of more than {LARGEST_HEAD_DIM} elements"
        if layout.format.is_packed and slots is not None:
            return f"single slots of {layout.format.value} blocks"
        if layout.format.is_packed and layout.key_dim % 2:
            return f"{layout.format.value} keys of an odd number of elements"
    return None


def decode_attention(
    q: Tensor,
    parts: Sequence[Part],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    query_position: Tensor | None = None,
    slots: Tensor | None = None,
    need_mass: bool = False,
    shared: dict[Any, Any] | None = None,
) -> tuple[Tensor, list[Tensor] | None]:
    """As :func:`kvatlas.kernels.decode_attention.decode_attention`, for calls that :func:`why_not` does not refuse."""
    R, Hq, _ = q.shape
    H = parts[0].table.shape[1]
    DV = parts[0].pool.layout.value_dim
    widths = [_num_slots(part, slots) for part in parts]
    runs = _runs(R * H, widths, parts, q)
    num_runs = sum(-(-width // run) for width, run in zip(widths, runs, strict=True))
    partial = torch.empty(R * Hq, max(1, num_runs), DV, dtype=torch.float32, device=q.device)
    lse = torch.empty(R * Hq, max(1, num_runs), dtype=torch.float32, device=q.device)
    q = q.contiguous()
    first, scores = 0, []
    for part, width, run in zip(parts, widths, runs, strict=True):
        kept = torch.empty(R * Hq, width, dtype=torch.float32, device=q.device) if need_mass else None
        scores.append(kept)
        if width:
            call = _Call(part, scale, softcap, window, query_position, slots)
            call.launch(q, partial, lse, kept, run=run, first_run=first, num_runs=num_runs, width=width)
            first += -(-width // run)
    out = torch.empty(R, Hq, DV, dtype=q.dtype, device=q.device)
    merged = torch.empty(R * Hq, dtype=torch.float32, device=q.device)
    merge_runs[(R * Hq,)](
        partial,
        lse,
        q if sinks is None else sinks,
        out,
        merged,
        num_runs,
        HQ=Hq,
        DV=DV,
        DVP=power_of_two(DV),
        SINKS=sinks is not None,
        RUNS=_MERGED_RUNS,
        num_warps=4,
    )
    if not need_mass:
        return out, None
    return out, [
        _mass(kept, merged, part.length, (R, H, width)) for kept, part, width in zip(scores, parts, widths, strict=True)
    ]


class _Call:
    """One launch over one part.

    Args:
        part: what to read.
        scale, softcap, window, query_position, slots: as of the operation.
    """

    def __init__(
        self,
        part: Part,
        scale: float,
        softcap: float | None,
        window: int | None,
        query_position: Tensor | None,
        slots: Tensor | None,
    ) -> None:
        self._part, self._slots = part, slots
        self._numbers = (scale, softcap or 0.0, window or 0, part.dense_start or 0)
        self._position = query_position
        self._flags = {
            "HIDE_EMPTY": part.hide_empty,
            "WINDOW": window is not None,
            "DENSE": part.dense_start is not None,
            "SOFTCAP": softcap is not None,
        }

    def launch(
        self,
        q: Tensor,
        partial: Tensor,
        lse: Tensor,
        scores: Tensor | None,
        *,
        run: int,
        first_run: int,
        num_runs: int,
        width: int,
    ) -> None:
        """Write this part's runs, ``first_run`` and on, of ``partial`` and ``lse``, and all of ``scores``."""
        part, layout, memory = self._part, self._part.pool.layout, self._part.pool.memory
        table, length = inner_contiguous(part.table), part.length.contiguous()
        R, H = table.shape[:2]
        grid = (R * H, -(-width // run))
        constants = layout_constants(part) | self._flags | {"H": H, "G": q.shape[1] // H, "SCORES": scores is not None}
        constants |= tile_constants(part, q.dtype, q.shape[1] // H)
        params = memory if layout.format.is_float else memory.view(torch.float16)
        sidecars = memory.view(torch.int32)
        position = length if self._position is None else self._position
        before = (sidecars, table, length)
        middle = (position, partial, lse, lse if scores is None else scores, *self._numbers, run, first_run, num_runs)
        strides = (table.stride(0), table.stride(1))
        stride = 0 if scores is None else scores.stride(0)
        if layout.format.is_packed:
            attend_packed[grid](q, sidecars, *before, *middle, *strides, stride, **constants)
            return
        elements = typed_elements(part.pool)
        slots = None if self._slots is None else self._slots.contiguous()
        attend_float[grid](
            q,
            elements,
            elements,
            params,
            *before,
            table if slots is None else slots,
            *middle,
            *strides,
            0 if slots is None else slots.shape[-1],
            stride,
            SLOTS=slots is not None,
            **constants,
        )


def layout_constants(part: Part) -> dict[str, int]:
    """Return where things lie in a part's blocks, in elements of the pointers that the kernels get."""
    layout = part.pool.layout
    has_positions = layout.positions
    constants = {
        "DK": layout.key_dim,
        "DV": layout.value_dim,
        "POSITION_OFFSET": layout.positions_offset // 4 if has_positions else 0,
    }
    if layout.format.is_packed:
        return constants | {
            "BITS": layout.format.bits,
            "V_OFFSET": layout.key_bytes // 4,
            "KP_OFFSET": layout.key_params_offset // 4,
            "VP_OFFSET": layout.value_params_offset // 4,
        }
    size = layout.format.element_bytes
    return constants | {
        "S": layout.block_size,
        "GRANULE": GRANULE // size,
        "V_OFFSET": layout.key_bytes // size,
        "KP_OFFSET": layout.key_params_offset // 2,
        "VP_OFFSET": layout.value_params_offset // 2,
        "INT8": layout.format is Format.INT8,
    }


def tile_constants(part: Part, dtype: torch.dtype, group: int) -> dict[str, Any]:
    """Return the sizes and types of a kernel's tiles, and how it is to be scheduled."""
    layout = part.pool.layout
    dot = _dot_type(layout.format, dtype)
    schedule, slots = SCHEDULES[layout.format], _step(part, dtype)
    constants = {
        "M": power_of_two(group, _ROWS),
        "DOT": _TYPES[dot],
        "SHIFT": _FLOAT16_SHIFT if dot == torch.float16 else 0.0,
        "STAGES": schedule.stages,
        "num_warps": schedule.warps,
    }
    if layout.format.is_packed:
        return constants | {
            "C": power_of_two(-(-layout.key_dim // 4), _ROWS),
            "GROUPS": power_of_two(-(-layout.value_dim // 32)),
            "B": slots // GROUP,
        }
    in_words = layout.format is Format.INT8 and dot == torch.float16
    return constants | {
        "WORDS": in_words and layout.key_dim % 4 == 0 == layout.value_dim % 4,
        "DKP": power_of_two(layout.key_dim, _ROWS),
        "DVP": power_of_two(layout.value_dim, _ROWS),
        "BLOCK": slots,
    }


def _dot_type(format: Format, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the products' operands."""
    if dtype == torch.float32:
        return dtype
    if not format.is_float:
        return torch.float16
    return dtype if TORCH_DTYPES[format] == dtype else torch.float32


def _step(part: Part, dtype: torch.dtype) -> int:
    """Return how many slots a step reads: fewer where rows are wide, as stages share the processor's memory."""
    layout = part.pool.layout
    row_bytes = max(power_of_two(layout.key_dim), power_of_two(layout.value_dim))
    row_bytes *= _dot_type(layout.format, dtype).itemsize
    slots = SCHEDULES[layout.format].slots
    return max(2 * GROUP if layout.format.is_packed else _ROWS, slots * 256 // max(256, row_bytes))


def _num_slots(part: Part, slots: Tensor | None) -> int:
    return part.table.shape[-1] * part.pool.layout.block_size if slots is None else slots.shape[-1]


def _runs(lanes: int, widths: Sequence[int], parts: Sequence[Part], q: Tensor) -> list[int]:
    """Return for each part how many slots a program reads, so that all processors have some programs each."""
    runs = []
    for part in parts:
        programs = SCHEDULES[part.pool.layout.format].programs * num_processors(q.device)
        fair, step = -(-sum(widths) * lanes // programs), _step(part, q.dtype)
        runs.append(-(-max(_SHORTEST_RUN, fair) // step) * step)
    return runs


def _mass(scores: Tensor | None, merged: Tensor, length: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the mass of one part in ``shape`` [R, H, S]."""
    assert scores is not None
    R, H, S = shape
    mass = torch.empty(shape, dtype=torch.float32, device=scores.device)
    if S:
        grid = (R * H, -(-S // _MASS_SLOTS))
        group = scores.shape[0] // (R * H)
        sum_mass[grid](scores, merged, length.contiguous(), mass, S, S, G=group, BLOCK=_MASS_SLOTS, num_warps=4)
    return mass
