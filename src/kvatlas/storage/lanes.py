"""Which lanes a model has, and which blocks each strategy's sequences draw for them, on which tier."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvatlas.core.plan import CachePlan, Deriver
from kvatlas.core.shapes import ModelShape
from kvatlas.core.streams import Stream
from kvatlas.core.vocabulary import Tier

if TYPE_CHECKING:
    from kvatlas.storage.arena import Arena, BlockClass, LentBlocks, SideClass

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

    def split(self, tensor: Tensor, dim: int = 1) -> list[Tensor]:
        """Return for each layer its lanes of a tensor [rows, lanes, ...]: cheaper than slicing layer by layer."""
        parts = torch.split(tensor, self._sizes, dim=dim)
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
    """

    blocks: LentBlocks
    lanes: Tensor


@dataclass(frozen=True, kw_only=True)
class KVGroup(LaneGroup):
    """Lanes whose blocks of keys and values are of one class, and so is what goes with them.

    Args:
        old: the class that full blocks are encoded to once they are old; None: they stay.
        home: of encoded blocks, the class of those that they were.
        side: the class of the blocks of streams beside them; None: there are none.
        derived: streams made from keys and values, each with who makes them.
    """

    blocks: BlockClass
    old: BlockClass | None = None
    home: BlockClass | None = None
    side: SideClass | None = None
    derived: tuple[tuple[Stream, Deriver], ...] = ()

    def only(self, lanes: Tensor) -> KVGroup:
        """Return the group with some of its lanes."""
        return replace(self, lanes=lanes)


class LaneClasses:
    """The block class of some layers' lanes.

    Args:
        lanes: the model's lanes.
        class_of_owner: layer that owns lanes -> class of their blocks; layers left out hold no blocks.
        groups: their lanes by class; None: worked out.
    """

    def __init__(
        self, lanes: LaneMap, class_of_owner: Mapping[int, LentBlocks], groups: Seq[LaneGroup] | None = None
    ) -> None:
        members: dict[LentBlocks, list[int]] = {}
        for index, blocks in class_of_owner.items():
            members.setdefault(blocks, []).append(index)
        self.groups = groups or [
            LaneGroup(blocks=blocks, lanes=lanes.lanes_of(layers)) for blocks, layers in members.items()
        ]


class KVClasses(LaneClasses):
    """The class of the blocks of keys and values of some layers' lanes, with what goes with it.

    Args:
        lanes: the model's lanes.
        layers: layer that owns lanes -> its group, but for the lanes; layers left out hold no blocks.

    Attributes:
        side: the blocks of streams beside them; None without any.
    """

    groups: Seq[KVGroup]

    def __init__(self, lanes: LaneMap, layers: Mapping[int, KVGroup]) -> None:
        self._lanes = lanes
        self._layers = layers
        members: dict[Hashable, list[int]] = {}
        for index, group in layers.items():
            key = group.blocks, group.old, group.home, group.side, group.derived
            members.setdefault(key, []).append(index)
        groups = [layers[indices[0]].only(lanes.lanes_of(indices)) for indices in members.values()]
        super().__init__(lanes, {}, groups)
        sides = {index: group.side for index, group in layers.items() if group.side is not None}
        self.side = LaneClasses(lanes, sides) if sides else None

    def holds(self, layer: int) -> bool:
        """Whether a layer's lanes have blocks here."""
        return self._lanes.owner(layer) in self._layers

    def group_of_layer(self, layer: int) -> KVGroup:
        """Return what the lanes that a layer reads have in common, but for which they are."""
        return self._layers[self._lanes.owner(layer)]

    def of_layer(self, layer: int) -> BlockClass:
        """Return the class of the blocks that a layer reads."""
        return self._layers[self._lanes.owner(layer)].blocks

    def side_of_layer(self, layer: int) -> SideClass | None:
        """Return the class of the blocks of streams beside those that a layer reads."""
        return self._layers[self._lanes.owner(layer)].side


class SequenceLayout(KVClasses):
    """Where a sequence keeps everything.

    Args:
        lanes: the model's lanes.
        device: the device tier.
        host: the host tier; may be None if no layer is placed there.
        plan: what is stored.

    Attributes:
        encoded: blocks of old tokens in a packed format; None without any.
        residual: int64 [lanes], newest tokens of a lane that are not encoded, at least.
        staging: device blocks that layers on the host are read through, by buffer layer; None without such layers.
        residents: device blocks that mirror what was chosen of layers on the host; None: nothing stays.
        records: device blocks of what lanes have one of; None without any.
        buffers: layer that reads host lanes -> layer whose lanes name its buffer in ``staging``.
        on_host: lanes [n] int64 whose own blocks, and lanes whose encoded ones, live on the host.
    """

    def __init__(self, lanes: LaneMap, device: Arena, host: Arena | None, plan: CachePlan) -> None:
        self.plan = plan
        self.buffers = plan.buffers
        hosted = {index: layer.old is not None for index, layer in plan.layers if layer.tier is Tier.HOST}
        self.on_host = tuple(
            lanes.lanes_of([index for index, packs in hosted.items() if packs is old]) for old in (False, True)
        )
        self.residual = torch.zeros(lanes.count, dtype=torch.int64)
        tiers = {Tier.DEVICE: device, Tier.HOST: host}
        records: dict[int, SideClass] = {}
        own: dict[int, KVGroup] = {}
        old: dict[int, KVGroup] = {}
        none = torch.zeros(0, dtype=torch.int64)
        for index, layer in plan.layers:
            tier, own_tier = tiers[layer.tier], tiers[layer.own_tier]
            assert tier is not None and own_tier is not None, "layers are placed on a host tier that does not exist"
            home, side = own_tier.block_class(layer.own), None if layer.side is None else device.side_class(layer.side)
            packed = None if layer.old is None else tier.block_class(layer.old)
            own[index] = KVGroup(blocks=home, lanes=none, old=packed, side=side, derived=layer.derived)
            if packed is not None:
                old[index] = KVGroup(blocks=packed, lanes=none, home=home, side=side, derived=layer.derived)
            self.residual[lanes.slices[index]] = layer.residual
            if layer.records is not None:
                records[index] = device.side_class(layer.records)
        super().__init__(lanes, own)
        self.encoded = KVClasses(lanes, old) if old else None
        buffers = {
            index: KVGroup(blocks=device.block_class(layer.lasting), lanes=none)
            for index, layer in plan.layers
            if index in set(self.buffers.values())
        }
        self.staging = KVClasses(lanes, buffers) if buffers else None
        mirrored = {
            index: KVGroup(blocks=device.block_class(layer.lasting), lanes=none)
            for index, layer in plan.layers
            if layer.tier is Tier.HOST and layer.resident
        }
        self.residents = KVClasses(lanes, mirrored) if mirrored else None
        self._records = records
        self.records = LaneClasses(lanes, records) if records else None

    def all_groups(self) -> list[LaneGroup]:
        """Return the groups of lanes of all rows that a sequence has, but for what lies beside encoded blocks."""
        parts = (self, self.side, self.staging, self.residents, self.encoded, self.records)
        return [group for part in parts if part is not None for group in part.groups]

    def records_of_layer(self, layer: int) -> SideClass | None:
        """Return the class of the blocks of what a layer's lanes have one of; None: there is nothing."""
        return self._records.get(self._lanes.owner(layer))

    def old_of_layer(self, layer: int) -> BlockClass | None:
        """Return the class of the encoded blocks that a layer reads; None: it has none."""
        return self.encoded.of_layer(layer) if self.encoded is not None and self.encoded.holds(layer) else None
