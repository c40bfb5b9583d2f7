"""Which lanes a model has, and which blocks each strategy's sequences draw for them, on which tier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvatlas.core.plan import CachePlan
from kvatlas.core.shapes import ModelShape
from kvatlas.core.vocabulary import Tier

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
    """Lanes whose blocks are of one class: ``lanes`` [n] int64.

    Args:
        blocks: their class.
        lanes: which.
        old: the class that full blocks are encoded to once they are old; None: they stay.
        home: of encoded blocks, the class of those that they were.
    """

    blocks: BlockClass
    lanes: Tensor
    old: BlockClass | None = None
    home: BlockClass | None = None

    def only(self, lanes: Tensor) -> LaneGroup:
        """Return the group with some of its lanes."""
        return replace(self, lanes=lanes)


class LaneClasses:
    """The block class of some layers' lanes.

    Args:
        lanes: the model's lanes.
        class_of_owner: layer that owns lanes -> class of their blocks; layers left out hold no blocks.
        old: likewise, the class that they are encoded to.
        home: likewise, the class that they were encoded from.
    """

    def __init__(
        self,
        lanes: LaneMap,
        class_of_owner: Mapping[int, BlockClass],
        *,
        old: Mapping[int, BlockClass] | None = None,
        home: Mapping[int, BlockClass] | None = None,
    ) -> None:
        self._lanes = lanes
        self._class_of_owner = class_of_owner
        old, home = old or {}, home or {}
        members: dict[tuple[BlockClass, BlockClass | None, BlockClass | None], list[int]] = {}
        for index, blocks in class_of_owner.items():
            members.setdefault((blocks, old.get(index), home.get(index)), []).append(index)
        self.groups = [
            LaneGroup(blocks=key[0], lanes=lanes.lanes_of(layers), old=key[1], home=key[2])
            for key, layers in members.items()
        ]

    def holds(self, layer: int) -> bool:
        """Whether a layer's lanes have blocks here."""
        return self._lanes.owner(layer) in self._class_of_owner

    def of_layer(self, layer: int) -> BlockClass:
        """Return the class of the blocks that a layer reads."""
        return self._class_of_owner[self._lanes.owner(layer)]


class SequenceLayout(LaneClasses):
    """Where a sequence keeps everything.

    Args:
        lanes: the model's lanes.
        device: the device tier.
        host: the host tier; may be None if no layer is placed there.
        plan: what is stored.

    Attributes:
        encoded: device blocks of old tokens in a packed format; None without any.
        residual: int64 [lanes], newest tokens of a lane that are not encoded, at least.
        staging: device blocks that layers on the host are read through, by buffer layer; None without such layers.
        sketch: device blocks of partial keys, slot by slot beside the keys on the host; None if not kept.
        buffers: layer that reads host lanes -> layer whose lanes name its buffer in ``staging``.
    """

    def __init__(self, lanes: LaneMap, device: Arena, host: Arena | None, plan: CachePlan) -> None:
        self.plan = plan
        self.buffers = plan.buffers
        self.host_lanes = lanes.lanes_of(plan.host_layers)
        tiers = {Tier.DEVICE: device, Tier.HOST: host}
        homes: dict[int, BlockClass] = {}
        for index, layer in plan.layers:
            tier = tiers[layer.tier]
            assert tier is not None, "layers are placed on a host tier that does not exist"
            homes[index] = tier.block_class(layer.own)
        old = {index: device.block_class(layer.old) for index, layer in plan.layers if layer.old is not None}
        super().__init__(lanes, homes, old=old)
        self.encoded = LaneClasses(lanes, old, home=homes) if old else None
        self.residual = torch.zeros(lanes.count, dtype=torch.int64)
        for index, layer in plan.layers:
            self.residual[lanes.slices[index]] = layer.residual
        buffers = {
            index: device.block_class(dict(plan.layers)[index].own) for index in sorted(set(self.buffers.values()))
        }
        self.staging = LaneClasses(lanes, buffers) if buffers else None
        sketches = {index: device.block_class(layer.sketch) for index, layer in plan.layers if layer.sketch is not None}
        self.sketch = LaneClasses(lanes, sketches) if sketches else None

    def old_of_layer(self, layer: int) -> BlockClass | None:
        """Return the class of the encoded blocks that a layer reads; None: it has none."""
        return self.encoded.of_layer(layer) if self.encoded is not None and self.encoded.holds(layer) else None
