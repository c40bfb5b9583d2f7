"""Bounds of the keys of each block, per channel: made when keys are written or moved, read to choose pages.

Bounds may be wider than the keys that are left, after one was evicted and its slot reused; they are never narrower.
Shapes: H lanes of one class, R sequences, m blocks of a lane, s slots of a block, Dk elements of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.kernels.blocks import bound_keys
from kvatlas.storage.arena import BlockClass


def bound_blocks(blocks: BlockClass, table: Tensor, used: Tensor) -> None:
    """Make the bounds of some blocks anew.

    Args:
        blocks: their class; without bounds, nothing happens.
        table: [H, m] block ids.
        used: [H, m] int64, how many slots at the front of each hold a key; blocks without one are left alone.
    """
    if blocks.pool.key_bounds is None:
        return
    ids, count = table.flatten().long().to(blocks.device), used.flatten().to(blocks.device)
    bound_keys(blocks.pool, ids[count > 0], count[count > 0])


def widen(blocks: BlockClass, block: Tensor, offset: Tensor, fresh: Tensor) -> None:
    """Let the bounds cover one key just written to each of some distinct blocks.

    Args:
        blocks: their class; without bounds, nothing happens.
        block: [R, H] int64.
        offset: [R, H] int64, slot of the key.
        fresh: [R, H] bool, whether it is the only key of its block.
    """
    pool = blocks.pool
    if pool.key_bounds is None:
        return
    key = pool.keys[block, offset].float()
    if not pool.layout.format.is_float:
        key *= pool.key_params[block, offset][..., None]
    low, high = pool.key_bounds[block].unbind(dim=-2)
    alone = fresh[..., None].to(key.device)
    pool.key_bounds[block] = torch.stack(
        [torch.where(alone, key, torch.minimum(low, key)), torch.where(alone, key, torch.maximum(high, key))], dim=-2
    )
