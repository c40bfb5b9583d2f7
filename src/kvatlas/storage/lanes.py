"""Which lanes a model has, and which blocks each strategy's sequences draw for them, on which tier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvatlas.core.layout import layout_of, sketch_layout_of, staging_buffers
from kvatlas.core.shapes import ModelShape
from kvatlas.core.vocabulary import Format, Sidecar

if TYPE_CHECKING:
    from kvatlas.storage.arena import Arena, BlockClass

NO_WINDOW = 2**40


class LaneMap:
    """Lanes of one sequence, numbered layer by layer over the layers that own keys and values.

    Args:
        shape: the model.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.count = shape.num_lanes
        starts: dict[int, int] = {}
        windows: list[int] = []
        for index in shape.owners:
            starts[index] = len(windows)
            windows += [shape.layers[index].window or NO_WINDOW] * shape.layers[index].num_kv_heads
        self.window_of_lane = torch.tensor(windows, dtype=torch.int64)
        self.slices = [self._slice(index, starts) for index in range(len(shape.layers))]
        self._sizes = [shape.layers[index].num_kv_heads for index in shape.owners]
        self._places = [shape.owners.index(self.owner(index)) for index in range(len(shape.layers))]
        self.windows = {
            window: (self.window_of_lane == window).nonzero().flatten() for window in sorted(set(windows) - {NO_WINDOW})
        }

    def owner(self, layer: int) -> int:
        """Return the layer whose lanes a layer reads: itself, unless it shares another's."""
        shared = self.shape.layers[layer].shares_kv_with
        return layer if shared is None else shared

    def lanes_of(self, layers: Collection[int]) -> Tensor:
        """Return the lanes [n] int64 of some layers that own lanes, in order."""
        spans = [torch.arange(self.slices[index].start, self.slices[index].stop) for index in sorted(layers)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *spans])

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return for each layer its lanes of a tensor [rows, lanes, ...]: cheaper than slicing layer by layer."""
        parts = torch.split(tensor, self._sizes, dim=1)
        return [parts[index] for index in self._places]

    def _slice(self, layer: int, starts: dict[int, int]) -> slice:
        owner = self.owner(layer)
        return slice(starts[owner], starts[owner] + self.shape.layers[owner].num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class LaneGroup:
    """Lanes whose blocks are of one class: ``lanes`` [n] int64."""

    blocks: BlockClass
    lanes: Tensor


class LaneClasses:
    """The block class of some layers' lanes.

    Args:
        lanes: the model's lanes.
        class_of_owner: layer that owns lanes -> class of their blocks; layers left out hold no blocks.
    """

    def __init__(self, lanes: LaneMap, class_of_owner: Mapping[int, BlockClass]) -> None:
        self._lanes = lanes
        self._class_of_owner = class_of_owner
        members: dict[BlockClass, list[int]] = {}
        for index, blocks in class_of_owner.items():
            members.setdefault(blocks, []).append(index)
        self.groups = [LaneGroup(blocks=blocks, lanes=lanes.lanes_of(layers)) for blocks, layers in members.items()]

    def holds(self, layer: int) -> bool:
        """Whether a layer's lanes have blocks here."""
        return self._lanes.owner(layer) in self._class_of_owner

    def of_layer(self, layer: int) -> BlockClass:
        """Return the class of the blocks that a layer reads."""
        return self._class_of_owner[self._lanes.owner(layer)]


class SequenceLayout(LaneClasses):
    """Where a sequence keeps everything, under one storage format, set of sidecars and placement.

    Args:
        lanes: the model's lanes.
        device: the device tier.
        host: the host tier; may be None if no layer is placed there.
        format: element format of new tokens.
        sidecars: what is stored per slot.
        block_size: slots per block.
        host_layers: layers that own lanes on the host; the others' are on the device.
        sketch_share: share of each key's columns that the device keeps of tokens on the host; 0: nothing.
        packed: format that old, full blocks are encoded to; None: none are.

    Attributes:
        encoded: device blocks of old tokens in a packed format, of layers without a sliding window; None without any.
        staging: device blocks that layers on the host are read through, by buffer layer; None without such layers.
        sketch: device blocks of partial keys, slot by slot beside the keys on the host; None if not kept.
        buffers: layer that reads host lanes -> layer whose lanes name its buffer in ``staging``.
    """

    def __init__(
        self,
        lanes: LaneMap,
        device: Arena,
        host: Arena | None,
        format: Format,
        sidecars: tuple[Sidecar, ...],
        block_size: int,
        host_layers: tuple[int, ...] = (),
        sketch_share: float = 0.0,
        packed: Format | None = None,
    ) -> None:
        self.key = (format, sidecars, host_layers, sketch_share, packed)
        self.host_layers = host_layers
        self.buffers = staging_buffers(lanes.shape, host_layers)
        self.host_lanes = lanes.lanes_of(host_layers)
        layers = lanes.shape.layers
        layouts = {index: layout_of(layers[index], format, block_size, sidecars) for index in lanes.shape.owners}
        tiers = {index: host if index in host_layers else device for index in layouts}
        homes = {index: tier.block_class(layouts[index]) for index, tier in tiers.items() if tier is not None}
        assert len(homes) == len(layouts), "layers are placed on a host tier that does not exist"
        super().__init__(lanes, homes)
        self.staging: LaneClasses | None = None
        self.sketch: LaneClasses | None = None
        self.encoded: LaneClasses | None = None
        if packed is not None:
            old = {
                index: device.block_class(layout_of(layers[index], packed, block_size, sidecars))
                for index in layouts
                if layers[index].window is None
            }
            self.encoded = LaneClasses(lanes, old)
        self._alike = {
            (group.blocks.layout.key_dim, group.blocks.layout.value_dim): group.blocks for group in self.groups
        }
        if host_layers:
            buffers = sorted(set(self.buffers.values()))
            self.staging = LaneClasses(lanes, {index: device.block_class(layouts[index]) for index in buffers})
        if host_layers and sketch_share:
            sketches = {
                index: device.block_class(sketch_layout_of(layers[index], format, block_size, sketch_share))
                for index in host_layers
            }
            self.sketch = LaneClasses(lanes, sketches)

    def home_of(self, old: BlockClass) -> BlockClass:
        """Return the blocks in which tokens wait that will be encoded to blocks of class ``old``."""
        return self._alike[old.layout.key_dim, old.layout.value_dim]

    def old_of(self, home: BlockClass) -> BlockClass | None:
        """Return the class that old blocks of class ``home`` are encoded to; None: they stay."""
        groups = () if self.encoded is None else self.encoded.groups
        return next((group.blocks for group in groups if self.home_of(group.blocks) is home), None)
