"""Blocks byte by byte, as :class:`kvatlas.core.layout.BlockLayout` tells it: the meaning that other forms agree with.

Shapes: C table columns, n blocks, s slots of a block, Dk and Dv elements of a key and a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from kvatlas.core.layout import GRANULE, BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.pool import BlockPool, Entries

_FLOATS = {Format.FP32: torch.float32, Format.BF16: torch.bfloat16, Format.FP16: torch.float16}


def write_slots(pool: BlockPool, block: Tensor, offset: Tensor, k: Tensor, v: Tensor | None) -> None:
    """As :func:`kvatlas.kernels.blocks.write_slots`."""
    block, offset = block.expand_as(block + offset), offset.expand_as(block + offset)
    for index in product(*map(range, block.shape)):
        _write_token(pool, int(block[index]), int(offset[index]), k[index], None if v is None else v[index])


def copy_slots(pool: BlockPool, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """As :func:`kvatlas.kernels.blocks.copy_slots`."""
    places = list(zip(source[0].flatten().tolist(), source[1].flatten().tolist(), strict=True))
    tokens = [[_bytes(pool, block, *span).clone() for span in _spans(pool.layout, slot)] for block, slot in places]
    places = list(zip(target[0].flatten().tolist(), target[1].flatten().tolist(), strict=True))
    for (block, slot), token in zip(places, tokens, strict=True):
        for span, stored in zip(_spans(pool.layout, slot), token, strict=True):
            _bytes(pool, block, *span)[:] = stored


def encode_blocks(pool: BlockPool, ids: Tensor, k: Tensor, v: Tensor) -> None:
    """As :func:`kvatlas.kernels.blocks.encode_blocks`."""
    layout = pool.layout
    for i, block in enumerate(ids.tolist()):
        if not layout.format.is_packed:
            for slot in range(layout.block_size):
                _write_token(pool, block, slot, k[i, slot], v[i, slot])
            continue
        _bytes(pool, block, 0, layout.key_params_offset)[:] = 0
        for channel in range(layout.key_dim):
            codes, scale, minimum = _levels(k[i, :, channel], layout.format.bits)
            for slot, code in enumerate(codes):
                _add_code(pool, block, _key_place(layout, slot, channel), code)
            for which, number in enumerate((scale, minimum)):
                at = layout.key_params_offset + 2 * (which * layout.key_dim + channel)
                _write(pool, block, at, number.reshape(1))
        groups = -(-layout.value_dim // 32)
        for slot, group in product(range(layout.block_size), range(groups)):
            codes, scale, minimum = _levels(v[i, slot, 32 * group : 32 * group + 32], layout.format.bits)
            for channel, code in enumerate(codes, start=32 * group):
                _add_code(pool, block, _value_place(layout, slot, channel), code)
            for which, number in enumerate((scale, minimum)):
                at = layout.value_params_offset + 2 * ((which * groups + group) * layout.block_size + slot)
                _write(pool, block, at, number.reshape(1))


def read_keys(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_keys`."""
    return _read(pool, table, dtype, values=False)


def read_values(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_values`."""
    return _read(pool, table, dtype, values=True)


def score_bounds(q: Tensor, bounds: Entries) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.score_bounds`."""
    layout, (R, H, C), width = bounds.pool.layout, bounds.table.shape, q.shape[-1]
    score = torch.full((R, H, C), -torch.inf, dtype=torch.float64)
    group, at = q.shape[1] // H, layout.offset(bounds.name)
    for r, h in product(range(R), range(H)):
        for column in range(-(-int(bounds.length[r, h]) // layout.block_size)):
            start = int(bounds.table[r, h, column]) * GRANULE + at
            stored = bounds.pool.memory[start : start + 8 * width].clone().view(torch.float32).double()
            least, greatest = stored[:width], stored[width:]
            if (least > greatest).any():
                continue
            for head in range(h * group, (h + 1) * group):
                bound = torch.maximum(q[r, head].double() * least, q[r, head].double() * greatest).sum()
                score[r, h, column] = torch.maximum(score[r, h, column], bound.cpu())
    return score.float().to(q.device)


def _bytes(pool: BlockPool, block: int, at: int, count: int) -> Tensor:
    start = block * GRANULE + at
    return pool.memory[start : start + count]


def _write(pool: BlockPool, block: int, at: int, numbers: Tensor) -> None:
    stored = numbers.contiguous().view(torch.uint8)
    _bytes(pool, block, at, len(stored))[:] = stored


def _read_numbers(pool: BlockPool, block: int, at: int, dtype: torch.dtype, count: int) -> Tensor:
    return _bytes(pool, block, at, count * dtype.itemsize).clone().view(dtype)


def _spans(layout: BlockLayout, slot: int) -> Iterator[tuple[int, int]]:
    """Yield where the key, the value and their scales of one slot lie in a block: (first byte, bytes)."""
    for start, width in ((0, layout.key_dim), (layout.key_bytes, layout.value_dim)):
        size = width * layout.format.element_bytes
        yield start + slot * size, size
    if layout.format is Format.INT8:
        yield layout.key_params_offset + 2 * slot, 2
        yield layout.value_params_offset + 2 * slot, 2


def _write_token(pool: BlockPool, block: int, slot: int, k: Tensor, v: Tensor | None) -> None:
    spans = list(_spans(pool.layout, slot))
    for side, x in enumerate((k, v)):
        if x is None:
            continue
        if pool.layout.format.is_float:
            _write(pool, block, spans[side][0], x.to(_FLOATS[pool.layout.format]))
            continue
        x = x.float()
        scale = (x.abs().max() / 127).clamp(max=65504).half()
        codes = (x / scale.float()).round().clamp(-127, 127) if scale > 0 else torch.zeros_like(x)
        _write(pool, block, spans[side][0], codes.to(torch.int8))
        _write(pool, block, spans[2 + side][0], scale.reshape(1))


def _levels(x: Tensor, bits: int) -> tuple[list[int], Tensor, Tensor]:
    """Return the codes of one group of numbers, their scale and their minimum."""
    x, levels = x.float(), 2**bits - 1
    minimum = x.min().clamp(-65504, 65504).half() + 0.0  # -0 becomes 0
    scale = ((x.max() - x.min()) / levels).clamp(max=65504).half()
    if scale == 0:
        return [0] * len(x), scale, minimum
    codes = ((x - minimum.float()) / scale.float()).round().clamp(0, levels)
    return [int(code) for code in codes.tolist()], scale, minimum


def _key_place(layout: BlockLayout, slot: int, channel: int) -> tuple[int, int]:
    """Return (byte of the block, lowest bit) of a code: the run of its 4 channels, its token the quad."""
    return _place(layout.format.bits, run=channel // 4, quad=slot, element=channel % 4)


def _value_place(layout: BlockLayout, slot: int, channel: int) -> tuple[int, int]:
    """Likewise: the run of its 32 channels and its 4 tokens, its channel the quad."""
    byte, bit = _place(layout.format.bits, run=channel // 32 * 8 + slot // 4, quad=channel % 32, element=slot % 4)
    return layout.key_bytes + byte, bit


def _place(bits: int, run: int, quad: int, element: int) -> tuple[int, int]:
    n = 4 * bits
    return run * 16 * bits + 4 * (quad % n) + element, quad // n * bits


def _add_code(pool: BlockPool, block: int, place: tuple[int, int], code: int) -> None:
    byte, bit = place
    _bytes(pool, block, byte, 1)[:] += code << bit


def _read(pool: BlockPool, table: Tensor, dtype: torch.dtype, *, values: bool) -> Tensor:
    layout = pool.layout
    width = layout.value_dim if values else layout.key_dim
    *lanes, C = table.shape
    out = torch.empty(*lanes, C * layout.block_size, width, dtype=dtype, device=pool.device)
    for index in product(*map(range, lanes)):
        for i in range(C * layout.block_size):
            block = int(table[(*index, i // layout.block_size)])
            out[(*index, i)] = _token(pool, block, i % layout.block_size, values=values).to(dtype)
    return out


def _token(pool: BlockPool, block: int, slot: int, *, values: bool) -> Tensor:
    """Return one key or value [D], in float32 unless it is stored in another float type."""
    layout = pool.layout
    width = layout.value_dim if values else layout.key_dim
    if layout.format.is_packed:
        return _packed_token(pool, block, slot, width, values=values)
    spans = list(_spans(layout, slot))
    start = spans[values][0]
    if layout.format.is_float:
        return _read_numbers(pool, block, start, _FLOATS[layout.format], width)
    scale = _read_numbers(pool, block, spans[2 + values][0], torch.float16, 1).float()
    return _read_numbers(pool, block, start, torch.int8, width).float() * scale


def _packed_token(pool: BlockPool, block: int, slot: int, width: int, *, values: bool) -> Tensor:
    layout = pool.layout
    number = torch.empty(width, device=pool.device)
    groups = -(-layout.value_dim // 32)
    for channel in range(width):
        byte, bit = (_value_place if values else _key_place)(layout, slot, channel)
        code = int(_bytes(pool, block, byte, 1)) >> bit & 2**layout.format.bits - 1
        if values:
            start = layout.value_params_offset
            at = [start + 2 * ((which * groups + channel // 32) * layout.block_size + slot) for which in (0, 1)]
        else:
            at = [layout.key_params_offset + 2 * (which * layout.key_dim + channel) for which in (0, 1)]
        scale, minimum = (_read_numbers(pool, block, each, torch.float16, 1).double() for each in at)
        number[channel] = (code * scale + minimum).float()
    return number
