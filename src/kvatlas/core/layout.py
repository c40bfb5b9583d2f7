"""How the bytes of one block lie: keys, values, then sidecars; shared by storage, footprints and tests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import SIDECAR_SLOT_BYTES, Format, Sidecar

DEFAULT_BLOCK_SIZE = 32
GRANULE = 64
"""Blocks start and end at multiples of this many bytes: a cache line, and enough for every element type."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """A block: ``block_size`` slots of one lane.

    Args:
        key_dim: elements of one key.
        value_dim: elements of one value.
        format: element format of keys and values.
        block_size: slots of one block, tokens.
        sidecars: what is stored per slot beside keys and values, 4 bytes each.
    """

    key_dim: int
    value_dim: int
    format: Format
    block_size: int = DEFAULT_BLOCK_SIZE
    sidecars: tuple[Sidecar, ...] = (Sidecar.POSITIONS,)

    @cached_property
    def key_bytes(self) -> int:
        """Bytes of the keys of one block."""
        return self.block_size * self.key_dim * self.format.element_bytes

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one block."""
        return self.key_bytes + self.block_size * self.value_dim * self.format.element_bytes

    @cached_property
    def sidecar_bytes(self) -> int:
        """Bytes of the sidecars of one block, alignment included."""
        return self.block_bytes - self.kv_bytes

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block with its sidecars, rounded up to a cache line."""
        return -(-(self._sidecar_start + self._sidecar_span) // GRANULE) * GRANULE

    def sidecar_offset(self, sidecar: Sidecar) -> int:
        """Return where a sidecar starts inside the block, bytes."""
        index = self.sidecars.index(sidecar)
        return self._sidecar_start + index * self.block_size * SIDECAR_SLOT_BYTES

    @property
    def _sidecar_start(self) -> int:
        return -(-self.kv_bytes // SIDECAR_SLOT_BYTES) * SIDECAR_SLOT_BYTES

    @property
    def _sidecar_span(self) -> int:
        return len(self.sidecars) * self.block_size * SIDECAR_SLOT_BYTES


def sketch_layout_of(layer: LayerShape, format: Format, block_size: int, share: float) -> BlockLayout:
    """Return the block layout of partial keys: a ``share`` of the columns of each key, and no values."""
    return BlockLayout(
        key_dim=max(1, round(share * layer.key_dim)), value_dim=0, format=format, block_size=block_size, sidecars=()
    )


def staging_buffers(shape: ModelShape, host_layers: Collection[int]) -> dict[int, int]:
    """Return for each layer that reads lanes on the host the layer whose lanes name its buffer on the device.

    Layers whose lanes are alike take turns with two buffers: one is filled while the other is read.

    Args:
        shape: the model.
        host_layers: layers that own lanes on the host.
    """
    owners: dict[tuple[int, int, int], list[int]] = {}
    readers: dict[tuple[int, int, int], list[int]] = {}
    for index, layer in enumerate(shape.layers):
        kind = (layer.num_kv_heads, layer.key_dim, layer.value_dim)
        if index in host_layers:
            owners.setdefault(kind, []).append(index)
        if (index if layer.shares_kv_with is None else layer.shares_kv_with) in host_layers:
            readers.setdefault(kind, []).append(index)
    return {
        index: owners[kind][:2][turn % len(owners[kind][:2])]
        for kind, indices in readers.items()
        for turn, index in enumerate(indices)
    }


def layout_of(layer: LayerShape, format: Format, block_size: int, sidecars: tuple[Sidecar, ...]) -> BlockLayout:
    """Return the block layout of one layer's lanes."""
    return BlockLayout(
        key_dim=layer.key_dim, value_dim=layer.value_dim, format=format, block_size=block_size, sidecars=sidecars
    )
