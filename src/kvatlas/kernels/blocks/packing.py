"""Codes of packed formats as tensors: bytes to codes, codes to bytes, for whole blocks on any device.

The layout is that of :class:`kvatlas.core.layout.BlockLayout`. Shapes: n blocks, s = 32 slots, Dk and Dv elements of a
key and a value, L runs, Q = 32 quads of 4 elements in a run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvatlas.core.layout import GROUP, QUAD


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes [n, key_bytes] of key codes, uint8 [n, s, Dk]."""
    n, _, width = codes.shape
    padded = pad(codes, (0, -width % QUAD))
    return _pack(padded.view(n, GROUP, -1, QUAD).transpose(1, 2), bits)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes [n, value_bytes] of value codes, uint8 [n, s, Dv]."""
    n, _, width = codes.shape
    padded = pad(codes, (0, -width % GROUP))
    quads = padded.view(n, GROUP // QUAD, QUAD, -1, GROUP).permute(0, 3, 1, 4, 2)
    return _pack(quads.flatten(1, 2), bits)


def unpack_keys(stored: Tensor, bits: int, width: int) -> Tensor:
    """Return the key codes, uint8 [n, s, Dk], of bytes [n, key_bytes]; ``width`` is Dk."""
    return _unpack(stored, bits).transpose(1, 2).flatten(2)[..., :width]


def unpack_values(stored: Tensor, bits: int, width: int) -> Tensor:
    """Return the value codes, uint8 [n, s, Dv], of bytes [n, value_bytes]; ``width`` is Dv."""
    runs = _unpack(stored, bits)
    quads = runs.view(runs.shape[0], -1, GROUP // QUAD, *runs.shape[2:])
    return quads.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)[..., :width]


def _pack(quads: Tensor, bits: int) -> Tensor:
    """Return bytes [n, L * 16 * bits] of quads [n, L, Q, 4]."""
    parts = quads.reshape(*quads.shape[:2], 8 // bits, 4 * bits, QUAD).unbind(2)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * index)
    return packed.flatten(1)


def _unpack(stored: Tensor, bits: int) -> Tensor:
    """Return quads [n, L, Q, 4] of bytes [n, L * 16 * bits]."""
    runs = stored.view(stored.shape[0], -1, 4 * bits, QUAD)
    mask = (1 << bits) - 1
    return torch.cat([(runs >> (bits * index)) & mask for index in range(8 // bits)], dim=2)
