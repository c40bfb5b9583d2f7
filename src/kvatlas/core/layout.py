"""How the bytes of one block lie: keys, values, then positions; shared by storage, footprints and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kvatlas.core.errors import ConfigError
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format

DEFAULT_BLOCK_SIZE = 32
GRANULE = 64
"""Blocks start and end at multiples of this many bytes: a cache line, and enough for every element type."""
QUAD = 4
"""Elements that one integer dot product of the processor sums over."""
GROUP = 32
"""Tokens, or channels, that share one scale in packed formats."""
PARAM_BYTES = 2
"""Bytes of a scale or a minimum: float16."""
POSITION_BYTES = 4
"""Bytes of a position: int32."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """A block: ``block_size`` slots of one lane.

    In this order: codes of the keys, codes of the values, parameters of the keys (scales, minima), parameters of the
    values, positions (int32 [s]). Parameters are float16. With s slots, Dk and Dv elements of a key and a value:

    - float formats: keys [s, Dk], values [s, Dv]; no parameters.
    - ``int8``: signed codes [s, Dk] and [s, Dv]; scales [s] of the keys, [s] of the values.
    - ``int4``, ``int2`` (s is 32): unsigned codes, packed so that integer dot products need no shuffles. A *quad* is
      4 elements that one product sums over: 4 channels of a key, 4 tokens of a value. Keys: for each 4 channels
      (Dk rounded up), a run of 16 * bits bytes; values: for each 32 channels (Dv rounded up), for each 4 tokens, such
      a run. Byte 4 * i + j of a run holds element j of the quads i, i + n, i + 2n .. in ascending bits, where
      n = 4 * bits; a key's quad i is token i of the block, a value's is channel i of the 32.
      Parameters: keys [2, Dk], values [2, ceil(Dv / 32), s]: scales, then minima; element = code * scale + minimum.

    Args:
        key_dim: elements of one key.
        value_dim: elements of one value.
        format: element format of keys and values.
        block_size: slots of one block, tokens.
        positions: whether the position of the token in each slot is stored.
    """

    key_dim: int
    value_dim: int
    format: Format
    block_size: int = DEFAULT_BLOCK_SIZE
    positions: bool = True

    def __post_init__(self) -> None:
        if self.format.is_packed and self.block_size != GROUP:
            raise ConfigError(
                f"{self.format.value} (kivi) is stored in blocks of {GROUP} tokens, one group of scales; "
                f"a block size of {self.block_size} cannot hold it: use a block size of {GROUP}"
            )

    @cached_property
    def key_bytes(self) -> int:
        """Bytes of the codes of one block's keys; its values start here."""
        columns = _rounded(self.key_dim, QUAD) if self.format.is_packed else self.key_dim
        return self.block_size * columns * self.format.bits // 8

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of the codes of one block's values."""
        columns = _rounded(self.value_dim, GROUP) if self.format.is_packed else self.value_dim
        return self.block_size * columns * self.format.bits // 8

    @cached_property
    def key_params_offset(self) -> int:
        """Where the scales of the keys start, bytes."""
        return _rounded(self.key_bytes + self.value_bytes, PARAM_BYTES)

    @cached_property
    def value_params_offset(self) -> int:
        """Where the scales of the values start, bytes."""
        keys = 0 if self.format.is_float else 2 * self.key_dim if self.format.is_packed else self.block_size
        return self.key_params_offset + keys * PARAM_BYTES

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one block, their scales and minima included."""
        groups = 2 * -(-self.value_dim // GROUP) if self.format.is_packed else 0 if self.format.is_float else 1
        return self.value_params_offset + groups * self.block_size * PARAM_BYTES

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block, rounded up to a cache line."""
        return _rounded(self.positions_offset + self.positions * self.block_size * POSITION_BYTES, GRANULE)

    @cached_property
    def positions_offset(self) -> int:
        """Where the positions start inside the block, bytes."""
        return _rounded(self.kv_bytes, POSITION_BYTES)


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step


def staging_buffers(shape: ModelShape, host: Mapping[int, BlockLayout]) -> dict[int, int]:
    """Return for each layer that reads lanes on the host the layer whose lanes name its buffer on the device.

    Layers whose lanes are alike take turns with two buffers: one is filled while the other is read.

    Args:
        shape: the model.
        host: layer that owns lanes on the host -> layout of its blocks.
    """
    owners: dict[tuple[int, BlockLayout], list[int]] = {}
    readers: dict[tuple[int, BlockLayout], list[int]] = {}
    for index, layer in enumerate(shape.layers):
        layout = host.get(index if layer.shares_kv_with is None else layer.shares_kv_with)
        if layout is None:
            continue
        kind = (layer.num_kv_heads, layout)
        readers.setdefault(kind, []).append(index)
        if index in host:
            owners.setdefault(kind, []).append(index)
    return {
        index: owners[kind][:2][turn % len(owners[kind][:2])]
        for kind, indices in readers.items()
        for turn, index in enumerate(indices)
    }


def layout_of(layer: LayerShape, format: Format, block_size: int) -> BlockLayout:
    """Return the block layout of one layer's lanes."""
    return BlockLayout(key_dim=layer.key_dim, value_dim=layer.value_dim, format=format, block_size=block_size)
