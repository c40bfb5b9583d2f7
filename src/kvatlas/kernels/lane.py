"""Reading one lane in any format, slot by slot as the layout is defined: for the references alone.

Shapes: s slots of a block, n slots to read, Dk and Dv elements of a key and a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.core.layout import GROUP, QUAD, BlockLayout
from kvatlas.kernels.pool import BlockPool, Part


def lane_keys(pool: BlockPool, table: Tensor, slots: Tensor) -> Tensor:
    """Return the keys of some slots of one lane, float64 [n, Dk].

    Args:
        pool: where the blocks lie.
        table: [C] block ids of the lane.
        slots: [n] numbers of slots.
    """
    keys = [_key(pool, *_place(pool, table, int(slot))) for slot in slots]
    return torch.stack(keys) if keys else torch.zeros(0, pool.layout.key_dim, dtype=torch.float64, device=table.device)


def lane_values(pool: BlockPool, table: Tensor, slots: Tensor) -> Tensor:
    """Return the values of some slots of one lane, float64 [n, Dv]; arguments as :func:`lane_keys`."""
    values = [_value(pool, *_place(pool, table, int(slot))) for slot in slots]
    width = pool.layout.value_dim
    return torch.stack(values) if values else torch.zeros(0, width, dtype=torch.float64, device=table.device)


def lane_positions(part: Part, table: Tensor, slots: Tensor) -> Tensor:
    """Return the positions [n] of some slots of one lane, -1 for a slot without a token."""
    if part.dense_start is not None:
        return part.dense_start + slots
    places = (_place(part.pool, table, int(slot)) for slot in slots)
    return torch.tensor([int(part.pool.positions[block, offset]) for block, offset in places], device=table.device)


def key_codes(pool: BlockPool, block: int) -> Tensor:
    """Return the codes of a packed block's keys, uint8 [s, Dk]."""
    layout, bits = pool.layout, pool.layout.format.bits
    t, c = _grid(layout, layout.key_dim, pool.memory.device)
    return _unpack(pool.key_codes[block], bits, run=c // QUAD, quad=t, element=c % QUAD)


def value_codes(pool: BlockPool, block: int) -> Tensor:
    """Return the codes of a packed block's values, uint8 [s, Dv]."""
    layout, bits = pool.layout, pool.layout.format.bits
    t, d = _grid(layout, layout.value_dim, pool.memory.device)
    run = d // GROUP * (layout.block_size // QUAD) + t // QUAD
    return _unpack(pool.value_codes[block], bits, run=run, quad=d % GROUP, element=t % QUAD)


def _unpack(codes: Tensor, bits: int, *, run: Tensor, quad: Tensor, element: Tensor) -> Tensor:
    quads = 4 * bits  # those in the lowest bits of a run's bytes
    byte = codes[16 * bits * run + QUAD * (quad % quads) + element].long()
    code: Tensor = byte >> (bits * (quad // quads)) & (2**bits - 1)
    return code.to(torch.uint8)


def _key(pool: BlockPool, block: int, offset: int) -> Tensor:
    if pool.layout.format.is_packed:
        scale, minimum = pool.key_params[block].double()
        return torch.addcmul(minimum, key_codes(pool, block)[offset].double(), scale)
    key = pool.keys[block, offset].double()
    return key if pool.layout.format.is_float else key.mul(pool.key_params[block, offset].double())


def _value(pool: BlockPool, block: int, offset: int) -> Tensor:
    if pool.layout.format.is_packed:
        scale, minimum = pool.value_params[block, :, :, offset].double()
        group = torch.arange(pool.layout.value_dim, device=scale.device) // GROUP
        return torch.addcmul(minimum[group], value_codes(pool, block)[offset].double(), scale[group])
    value = pool.values[block, offset].double()
    return value if pool.layout.format.is_float else value.mul(pool.value_params[block, offset].double())


def _place(pool: BlockPool, table: Tensor, slot: int) -> tuple[int, int]:
    return int(table[slot // pool.layout.block_size]), slot % pool.layout.block_size


def _grid(layout: BlockLayout, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the token [s, 1] and the channel [1, width] of each element of a block."""
    tokens = torch.arange(layout.block_size, device=device)
    return tokens[:, None], torch.arange(width, device=device)[None]
