"""The blocks of one layout, as kernels see them: bytes of an arena, and views into them.

A block id is the block's place in the arena in units of ``GRANULE`` bytes; rows of the views overlap, so only the rows
of lent ids mean something. Shapes: N rows, s slots of a block, Dk and Dv elements of a key and a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvatlas.core.layout import GRANULE, GROUP, BlockLayout
from kvatlas.core.streams import ELEMENT_BYTES, SideLayout
from kvatlas.core.vocabulary import Format

TORCH_DTYPES = {
    Format.FP32: torch.float32,
    Format.BF16: torch.bfloat16,
    Format.FP16: torch.float16,
    Format.INT8: torch.int8,
}
_ELEMENTS: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ELEMENT_BYTES}


@dataclass(frozen=True, eq=False)
class BlockPool:
    """All blocks of one layout in one arena.

    Args:
        memory: the arena, uint8 [bytes].
        layout: how a block lies.
    """

    memory: Tensor
    layout: BlockLayout

    @property
    def device(self) -> torch.device:
        """Where the blocks live."""
        return self.memory.device

    @cached_property
    def rows(self) -> int:
        """Ids below this number name a whole block."""
        return _num_rows(self.memory, self.layout.block_bytes)

    @cached_property
    def keys(self) -> Tensor:
        """Keys [N, s, Dk], as stored; float formats and int8 only."""
        return self._view(TORCH_DTYPES[self.layout.format], 0, self.layout.block_size, self.layout.key_dim)

    @cached_property
    def values(self) -> Tensor:
        """Values [N, s, Dv], likewise."""
        dtype = TORCH_DTYPES[self.layout.format]
        return self._view(dtype, self.layout.key_bytes, self.layout.block_size, self.layout.value_dim)

    @cached_property
    def slots(self) -> tuple[Tensor, ...]:
        """All that is stored of single tokens [N, s, ..], positions left out; float formats and int8 only."""
        params = () if self.layout.format.is_float else (self.key_params, self.value_params)
        return (self.keys, self.values, *params)

    @cached_property
    def key_codes(self) -> Tensor:
        """Codes of the keys as they lie, uint8 [N, bytes]."""
        return self._view(torch.uint8, 0, self.layout.key_bytes)

    @cached_property
    def value_codes(self) -> Tensor:
        """Codes of the values as they lie, uint8 [N, bytes]."""
        return self._view(torch.uint8, self.layout.key_bytes, self.layout.value_bytes)

    @cached_property
    def key_params(self) -> Tensor:
        """Float16: scales [N, s] of int8; scales and minima [N, 2, Dk] of packed formats."""
        shape = (2, self.layout.key_dim) if self.layout.format.is_packed else (self.layout.block_size,)
        return self._view(torch.float16, self.layout.key_params_offset, *shape)

    @cached_property
    def value_params(self) -> Tensor:
        """Float16: scales [N, s] of int8; scales and minima [N, 2, ceil(Dv / 32), s] of packed formats."""
        size = self.layout.block_size
        shape = (2, -(-self.layout.value_dim // GROUP), size) if self.layout.format.is_packed else (size,)
        return self._view(torch.float16, self.layout.value_params_offset, *shape)

    @cached_property
    def positions(self) -> Tensor:
        """Position of the token in each slot, int32 [N, s]; -1: the slot is empty. Not every layout has them."""
        return self._view(torch.int32, self.layout.positions_offset, self.layout.block_size)

    def _view(self, dtype: torch.dtype, offset_bytes: int, *shape: int) -> Tensor:
        return _view(self.memory, self.rows, dtype, offset_bytes, shape)


@dataclass(frozen=True, eq=False)
class SidePool:
    """All blocks of streams of one layout in one arena.

    Args:
        memory: the arena, uint8 [bytes].
        layout: how a block lies.
    """

    memory: Tensor
    layout: SideLayout

    def __post_init__(self) -> None:
        object.__setattr__(self, "_views", {})

    def view(self, name: str) -> Tensor:
        """Return the entries of a stream [N, n, width]: n of a block."""
        views: dict[str, Tensor] = self.__dict__["_views"]
        if name not in views:
            layout, stream = self.layout, self.layout.stream(name)
            shape = (layout.entries(name), stream.width)
            rows = _num_rows(self.memory, layout.block_bytes)
            views[name] = _view(self.memory, rows, _ELEMENTS[stream.dtype], layout.offset(name), shape)
        return views[name]


def _num_rows(memory: Tensor, block_bytes: int) -> int:
    """Return the number below which ids name a whole block."""
    return max(0, (memory.numel() - block_bytes) // GRANULE + 1)


def _view(memory: Tensor, rows: int, dtype: torch.dtype, offset_bytes: int, shape: tuple[int, ...]) -> Tensor:
    size, strides = dtype.itemsize, [1]
    for width in reversed(shape[1:]):
        strides.insert(0, strides[0] * width)
    with torch.inference_mode(False):  # a view of another type that is made within could not be written outside
        return memory.view(dtype).as_strided((rows, *shape), (GRANULE // size, *strides), offset_bytes // size)


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The entries of a stream in some blocks of some lanes.

    Args:
        pool: where the blocks lie.
        name: of the stream.
        table: [R, H, C] int32 block ids.
        length: [R, H] int64, slots in use at the front of each lane.
    """

    pool: SidePool
    name: str
    table: Tensor
    length: Tensor


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Where the attention that slots receive is added to what they have.

    Args:
        entries: of each part, a float32 per slot, in blocks that nobody else has.
        factor: of what is added.
    """

    entries: list[Entries]
    factor: float = 1.0

    def add(self, masses: list[Tensor]) -> None:
        """Add what the slots of each part received, [R, H, C * s]."""
        for each, mass in zip(self.entries, masses, strict=True):
            kept = each.pool.view(each.name).squeeze(-1)
            columns = -(-each.length // kept.shape[1])
            # What stands behind a lane's last block is left over from other times, and gets nothing.
            held = torch.arange(each.table.shape[-1], device=each.table.device) < columns[..., None]
            amounts = (mass.view(*each.table.shape, -1) * self.factor).masked_fill(~held[..., None], 0.0)
            kept.index_add_(0, each.table.flatten().long(), amounts.flatten(0, 2))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some blocks of some lanes: a lane may have a part in one format and a part in another.

    Args:
        pool: where the blocks lie.
        table: [R, H, C] int32 block ids ([H, C] where one sequence is meant); all C columns may be read, so trim it.
        length: [R, H] (or [H]) int64, slots in use at the front of each lane, at most C * s.
        hide_empty: slots whose position is -1 hold no token and are hidden.
        dense_start: slot i of every lane holds position dense_start + i; None if slots are in any order.
    """

    pool: BlockPool
    table: Tensor
    length: Tensor
    hide_empty: bool = False
    dense_start: int | None = None
