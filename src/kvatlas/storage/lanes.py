"""Which lanes a model has, and which blocks each strategy's sequences draw for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.core.layout import layout_of
from kvatlas.core.shapes import ModelShape
from kvatlas.core.vocabulary import Format, Sidecar
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
        self.windows = {
            window: (self.window_of_lane == window).nonzero().flatten() for window in sorted(set(windows) - {NO_WINDOW})
        }

    def _slice(self, layer: int, starts: dict[int, int]) -> slice:
        owner = self.shape.layers[layer].shares_kv_with
        owner = layer if owner is None else owner
        return slice(starts[owner], starts[owner] + self.shape.layers[owner].num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class LaneGroup:
    """Lanes whose blocks are of one class: ``lanes`` [n] int64."""

    blocks: BlockClass
    lanes: Tensor


class SequenceLayout:
    """The block class of every lane under one storage format and set of sidecars.

    Args:
        lanes: the model's lanes.
        arena: where blocks come from.
        format: element format.
        sidecars: what is stored per slot.
        block_size: slots per block.
    """

    def __init__(
        self, lanes: LaneMap, arena: Arena, format: Format, sidecars: tuple[Sidecar, ...], block_size: int
    ) -> None:
        self.key = (format, sidecars)
        members: dict[BlockClass, list[int]] = {}
        class_of: dict[int, BlockClass] = {}
        for index in lanes.shape.owners:
            layout = layout_of(lanes.shape.layers[index], format, block_size, sidecars)
            class_of[index] = arena.block_class(layout)
            members.setdefault(class_of[index], []).extend(range(lanes.slices[index].start, lanes.slices[index].stop))
        self.groups = [
            LaneGroup(blocks=blocks, lanes=torch.tensor(ids, dtype=torch.int64)) for blocks, ids in members.items()
        ]
        shared = [layer.shares_kv_with for layer in lanes.shape.layers]
        self.class_of_layer = [class_of[i if owner is None else owner] for i, owner in enumerate(shared)]
