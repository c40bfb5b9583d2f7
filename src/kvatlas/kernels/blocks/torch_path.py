"""Blocks read and written in few torch operations, on any device.

Shapes: n blocks, s slots of a block, Dk and Dv elements of a key and a value, G groups of 32 value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvatlas.core.layout import GROUP
from kvatlas.kernels.blocks.packing import pack_keys, pack_values, unpack_keys, unpack_values
from kvatlas.kernels.gather import gather_slots
from kvatlas.kernels.pool import BlockPool, Entries

_HALF_MAX = torch.finfo(torch.float16).max
_INT8_MAX = 127


def write_slots(pool: BlockPool, block: Tensor, offset: Tensor, k: Tensor, v: Tensor | None) -> None:
    """As :func:`kvatlas.kernels.blocks.write_slots`."""
    for x, entry, scales in _sides(pool, k, v):
        if scales is None:
            entry[block, offset] = x.to(entry.dtype)
        else:
            entry[block, offset], scales[block, offset] = _to_int8(x)


def copy_slots(pool: BlockPool, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
    """As :func:`kvatlas.kernels.blocks.copy_slots`."""
    entries = [pool.keys, pool.values]
    if not pool.layout.format.is_float:
        entries += [pool.key_params, pool.value_params]
    for entry in entries:
        entry[target] = entry[source]


def encode_blocks(pool: BlockPool, ids: Tensor, k: Tensor, v: Tensor) -> None:
    """As :func:`kvatlas.kernels.blocks.encode_blocks`."""
    bits = pool.layout.format.bits
    ids = ids.long()
    if pool.layout.format.is_packed:
        codes, params = _to_levels(k.float(), 1, bits)
        pool.key_codes[ids], pool.key_params[ids] = pack_keys(codes, bits), params.squeeze(2)
        codes, params = _value_levels(v.float(), bits)
        pool.value_codes[ids], pool.value_params[ids] = pack_values(codes, bits), params
        return
    for x, entry, scales in _sides(pool, k, v):
        if scales is None:
            entry[ids] = x.to(entry.dtype)
        else:
            entry[ids], scales[ids] = _to_int8(x)


def read_keys(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_keys`."""
    format, width = pool.layout.format, pool.layout.key_dim
    if format.is_float:
        return gather_slots(pool.keys, table, dtype)
    if not format.is_packed:
        return _from_int8(pool.keys, pool.key_params, table, dtype)
    flat = table.reshape(-1)
    codes = unpack_keys(pool.key_codes.index_select(0, flat), format.bits, width)
    scale, minimum = pool.key_params.index_select(0, flat).float().unsqueeze(2).unbind(1)
    return _in_table_order(torch.addcmul(minimum, codes.float(), scale), table, dtype)


def read_values(pool: BlockPool, table: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.read_values`."""
    format, width = pool.layout.format, pool.layout.value_dim
    if format.is_float:
        return gather_slots(pool.values, table, dtype)
    if not format.is_packed:
        return _from_int8(pool.values, pool.value_params, table, dtype)
    flat = table.reshape(-1)
    codes = unpack_values(pool.value_codes.index_select(0, flat), format.bits, width)
    params = pool.value_params.index_select(0, flat).float().transpose(2, 3)
    scale, minimum = params.repeat_interleave(GROUP, dim=3)[..., :width].unbind(1)
    return _in_table_order(torch.addcmul(minimum, codes.float(), scale), table, dtype)


def score_bounds(q: Tensor, bounds: Entries) -> Tensor:
    """As :func:`kvatlas.kernels.blocks.score_bounds`."""
    R, Hq, width = q.shape
    H, C = bounds.table.shape[1:]
    entries = bounds.pool.view(bounds.name).index_select(0, bounds.table.reshape(-1)).view(R * H, C, 2, width)
    least, greatest = entries.unbind(2)
    grouped = q.float().reshape(R * H, Hq // H, width)
    upper = torch.bmm(grouped.clamp(min=0), greatest.transpose(1, 2))
    lower = torch.bmm(grouped.clamp(max=0), least.transpose(1, 2))
    score = (upper + lower).amax(dim=1).view(R, H, C)
    columns = -(-bounds.length // bounds.pool.layout.block_size)
    unused = torch.arange(C, device=q.device) >= columns.unsqueeze(-1)
    empty = (least[..., 0] > greatest[..., 0]).view(R, H, C)
    return score.masked_fill(unused | empty, -torch.inf)


def _sides(pool: BlockPool, k: Tensor, v: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Return keys and values to write, each with where it goes and where its scales go."""
    floats = pool.layout.format.is_float
    sides: list[tuple[Tensor, Tensor, Tensor | None]] = [(k, pool.keys, None if floats else pool.key_params)]
    if v is not None:
        sides.append((v, pool.values, None if floats else pool.value_params))
    return sides


def through_int8(x: Tensor) -> Tensor:
    """Return x [..., D] as int8 gives it back, in the type of x."""
    codes, scale = _to_int8(x.float())
    return (codes.float() * scale.float().unsqueeze(-1)).to(x.dtype)


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of x [..., D], int8, and scales [...], float16."""
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / _INT8_MAX).clamp(max=_HALF_MAX).half()
    codes = (x / scale.float()).round().clamp(-_INT8_MAX, _INT8_MAX)
    return torch.where(scale > 0, codes, 0.0).to(torch.int8), scale.squeeze(-1)


def _from_int8(codes: Tensor, scales: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    scale = gather_slots(scales, table, torch.float32)
    return (gather_slots(codes, table, torch.float32) * scale.unsqueeze(-1)).to(dtype)


def _to_levels(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes of x, uint8, and scales and minima over ``dim``, float16 stacked in a new dimension 1."""
    levels = (1 << bits) - 1
    least, greatest = x.aminmax(dim=dim, keepdim=True)
    minimum = least.clamp(-_HALF_MAX, _HALF_MAX).half() + 0.0  # a zero has no sign, whichever zero was the least
    scale = ((greatest - least) / levels).clamp(max=_HALF_MAX).half()
    codes = ((x - minimum.float()) / scale.float()).round().clamp(0, levels)
    return torch.where(scale > 0, codes, 0.0).to(torch.uint8), torch.stack([scale, minimum], dim=1)


def _value_levels(v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes [n, s, Dv] and parameters [n, 2, G, s] of values: groups of 32 channels, the last maybe fewer."""
    width = v.shape[2]
    # A channel that does not exist repeats the last one, so that it moves no minimum and no maximum.
    full = pad(v, (0, -width % GROUP), mode="replicate") if width % GROUP else v
    codes, params = _to_levels(full.view(*full.shape[:2], -1, GROUP), 3, bits)
    return codes.flatten(2)[..., :width], params.squeeze(4).transpose(2, 3)


def _in_table_order(decoded: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return decoded blocks [n, s, D] as [..., C * s, D]."""
    return decoded.reshape(*table.shape[:-1], -1, decoded.shape[2]).to(dtype)
