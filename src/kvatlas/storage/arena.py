"""One tier's memory: a byte arena cut into equal slabs, each lent to one block layout and returned when empty.

So blocks of different formats share one byte budget without fragmenting it. A block id is the block's place in the
arena in units of ``GRANULE`` bytes; one strided view per layout, whose rows overlap, turns any id into its block, so
a gather is one ``index_select`` whatever the layouts around it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.core.errors import CapacityError
from kvatlas.core.layout import GRANULE, BlockLayout
from kvatlas.core.streams import SideLayout
from kvatlas.core.units import format_bytes
from kvatlas.kernels.pool import BlockPool, SidePool
from kvatlas.storage.crossing import copy_rows, locked_memory
from kvatlas.storage.pages import advise_huge_pages

_RAW_BYTES = torch.int32.itemsize  # copying whole blocks as words is ten times faster than as bytes
_BOUNCE_BYTES = 4 << 20  # most bytes between reading and writing: what is on its way is in nobody's books
_SLAB_AIM_BYTES = 1024 * 1024
_BLOCKS_PER_SLAB = 16  # at least, so that little is left over where another layout does not fit exactly


@dataclass(frozen=True, kw_only=True)
class Books:
    """Where the arena's bytes are; ``used + cached + free == total`` always.

    Args:
        total: bytes of the arena.
        used: bytes of blocks that a sequence holds.
        cached: bytes of blocks that only the prefix cache holds; reclaimable at any time.
        free: everything else.
        used_kv: keys and values within ``used``.
        used_sidecars: positions, streams and padding within ``used``.
    """

    total: int
    used: int
    cached: int
    free: int
    used_kv: int
    used_sidecars: int


class LentBlocks:
    """All blocks of one layout: a free stack and reference counts.

    ``raw`` [N, words] int32 are whole blocks, views whose rows overlap as those of pools do. Counts are kept by
    *ordinal*, slab * blocks per slab + index in the slab.
    """

    def __init__(self, arena: Arena, layout: BlockLayout | SideLayout, memory: Tensor, slab_bytes: int) -> None:
        self.arena = arena
        self.block_bytes = layout.block_bytes
        self.kv_bytes = layout.kv_bytes
        self.per_slab = slab_bytes // self.block_bytes
        self._slab_bytes = slab_bytes
        rows = max(0, (memory.numel() - self.block_bytes) // GRANULE + 1)
        self.raw = memory.view(torch.int32).as_strided(
            (rows, self.block_bytes // _RAW_BYTES), (GRANULE // _RAW_BYTES, 1)
        )
        capacity = memory.numel() // slab_bytes * self.per_slab
        self.refs = torch.zeros(capacity, dtype=torch.int32)
        self.in_cache = torch.zeros(capacity, dtype=torch.bool)
        self.free_stack = torch.empty(capacity, dtype=torch.int32)  # ordinals
        self.num_free = self.num_cached = 0
        self.slabs: set[int] = set()

    def on(self, arena: Arena) -> LentBlocks:
        """Return the blocks of the same layout of another tier."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the blocks live."""
        return self.raw.device

    @property
    def num_owned(self) -> int:
        """Blocks that have an owner."""
        return len(self.slabs) * self.per_slab - self.num_free

    @property
    def num_only_cached(self) -> int:
        """Blocks whose only owner is the prefix cache; looks at lent slabs only, of which there may be few."""
        if not self.num_cached:
            return 0
        slabs = torch.tensor(sorted(self.slabs))
        refs, in_cache = (counts.view(-1, self.per_slab)[slabs] for counts in (self.refs, self.in_cache))
        return int((in_cache & (refs == 1)).sum())

    @property
    def idle_slabs(self) -> set[int]:
        """Lent slabs without an owned block."""
        if not self.slabs or self.num_free < self.per_slab:
            return set()
        slabs = torch.tensor(sorted(self.slabs))
        owned = (self.refs.view(-1, self.per_slab)[slabs] > 0).any(dim=1)
        return set(slabs[~owned].tolist())

    def ordinals(self, ids: Tensor) -> Tensor:
        """Return the ordinals [n] int64 of block ids [n]."""
        offset = ids.long() * GRANULE
        return offset // self._slab_bytes * self.per_slab + offset % self._slab_bytes // self.block_bytes

    def ids(self, ordinals: Tensor) -> Tensor:
        """Return the block ids [n] int32 of ordinals [n]."""
        slab, index = ordinals.long() // self.per_slab, ordinals.long() % self.per_slab
        return ((slab * self._slab_bytes + index * self.block_bytes) // GRANULE).int()


class BlockClass(LentBlocks):
    """All blocks of keys and values of one layout; ``pool`` is what kernels read and write."""

    def __init__(self, arena: Arena, layout: BlockLayout, memory: Tensor, slab_bytes: int) -> None:
        super().__init__(arena, layout, memory, slab_bytes)
        self.layout = layout
        self.pool = BlockPool(memory, layout)

    def on(self, arena: Arena) -> BlockClass:
        """Return the blocks of the same layout of another tier."""
        return arena.block_class(self.layout)

    @property
    def positions(self) -> Tensor:
        """Position of the token in each slot, int32 [N, bs]."""
        return self.pool.positions


class SideClass(LentBlocks):
    """All blocks of streams of one layout; ``pool`` is what kernels and strategies read."""

    def __init__(self, arena: Arena, layout: SideLayout, memory: Tensor, slab_bytes: int) -> None:
        super().__init__(arena, layout, memory, slab_bytes)
        self.layout = layout
        self.pool = SidePool(memory, layout)
        self.slot_streams = [self.pool.view(stream.name) for stream in layout.streams if layout.every(stream.name) == 1]
        self.filled = [
            (self.pool.view(stream.name), stream.fill) for stream in layout.streams if stream.fill is not None
        ]

    def on(self, arena: Arena) -> SideClass:
        """Return the blocks of the same layout of another tier."""
        return arena.side_class(self.layout)

    def fill(self, block: Tensor, offset: Tensor | None = None) -> None:
        """Let some slots begin: block ids and offsets, int64; None: all that these blocks hold."""
        for view, value in self.filled:
            if offset is None:
                view[block] = value
            else:
                view[block, offset] = value

    def gather(self, both: Tensor, order: Tensor) -> None:
        """Bring entries of two blocks [n, 2] into the first: its slots [n, s] are those of ``order``."""
        for view in self.slot_streams:
            entries = view[both].flatten(1, 2)
            view[both[:, 0]] = entries.gather(1, order[..., None].expand(*order.shape, entries.shape[-1]))

    def move(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Copy the entries of slots (block [n], offset [n]); all are read before any is written."""
        for view in self.slot_streams:
            view[target] = view[source]


def loose_blocks(like: BlockClass, number: int, beside: BlockClass) -> tuple[BlockClass, Tensor]:
    """Return blocks of the layout of one class, on the device of another, that are in no books; and their ids [n]."""
    step = like.block_bytes
    memory = torch.empty(max(1, number) * step, dtype=torch.uint8, device=beside.device)
    return BlockClass(beside.arena, like.layout, memory, memory.numel()), torch.arange(number) * (step // GRANULE)


def copy_blocks(source: LentBlocks, source_ids: Tensor, target: LentBlocks, target_ids: Tensor) -> None:
    """Copy whole blocks between two classes of one layout, a few MiB at a time.

    Args:
        source: where they lie.
        source_ids: int64 [n].
        target: where they go.
        target_ids: int64 [n].
    """
    at_once = max(1, _BOUNCE_BYTES // source.block_bytes)
    for first in range(0, len(source_ids), at_once):
        part = slice(first, first + at_once)
        copy_rows(source.raw, source_ids[part], target.raw, target_ids[part])


class Arena:
    """Lends blocks, counts references, and keeps books.

    Args:
        budget_bytes: most bytes the arena takes; rounded down to whole slabs.
        layouts: every layout that may be asked for; slabs are sized by the first and hold several of each.
        device: where the bytes live. Tables and counts stay on the CPU.
        option: the command-line option that sets the budget, for messages.
        locked: keep memory of the host where a CUDA device can reach it by itself.

    Raises:
        CapacityError: the budget does not hold one block, or so much memory cannot be locked.
    """

    def __init__(
        self,
        budget_bytes: int,
        layouts: Seq[BlockLayout],
        device: torch.device | str = "cpu",
        option: str = "--kv-memory",
        *,
        locked: bool = False,
    ) -> None:
        sizes, tier = [layout.block_bytes for layout in layouts], "host" if option == "--host-memory" else "KV"
        if sizes[0] > budget_bytes:
            raise CapacityError(
                f"{tier} memory of {format_bytes(budget_bytes)} does not hold one block of {format_bytes(sizes[0])}; "
                f"give more memory ({option}) or a smaller block size"
            )
        aim = max(_BLOCKS_PER_SLAB * max(sizes), min(_SLAB_AIM_BYTES, budget_bytes // 64))
        self.slab_bytes = sizes[0] * min(aim // sizes[0], budget_bytes // sizes[0])
        self.num_slabs = budget_bytes // self.slab_bytes
        self.total_bytes = self.num_slabs * self.slab_bytes
        self.device = torch.device(device)
        if locked:
            self._memory = locked_memory(self.total_bytes)
        else:
            self._memory = torch.empty(self.total_bytes, dtype=torch.uint8, device=device)
            advise_huge_pages(self._memory)
        self._empty_slabs = list(range(self.num_slabs - 1, -1, -1))
        self._of_layout: dict[BlockLayout, BlockClass] = {}
        self._of_side: dict[SideLayout, SideClass] = {}
        self._classes: list[LentBlocks] = []

    def block_class(self, layout: BlockLayout) -> BlockClass:
        """Return the blocks of ``layout``, made known on first use."""
        if layout not in self._of_layout:
            self._of_layout[layout] = BlockClass(self, layout, self._memory, self.slab_bytes)
            self._classes.append(self._of_layout[layout])
        return self._of_layout[layout]

    def side_class(self, layout: SideLayout) -> SideClass:
        """Return the blocks of streams of ``layout``, made known on first use."""
        if layout not in self._of_side:
            self._of_side[layout] = SideClass(self, layout, self._memory, self.slab_bytes)
            self._classes.append(self._of_side[layout])
        return self._of_side[layout]

    def classes(self) -> list[LentBlocks]:
        """Return all classes known so far."""
        return list(self._classes)

    def num_available(self, blocks: LentBlocks) -> int:
        """Return how many blocks could be allocated now without reclaiming cached ones."""
        idle = sum(len(other.idle_slabs) for other in self._classes if other is not blocks)
        return blocks.num_free + (len(self._empty_slabs) + idle) * blocks.per_slab

    def try_allocate(self, blocks: LentBlocks, count: int) -> Tensor | None:
        """Return ``count`` block ids [count] int32 with one reference each, or None if there are too few."""
        if count and not blocks.per_slab:
            return None  # a block of this layout is larger than a slab of so small a budget
        while blocks.num_free < count:
            slab = self._take_slab(blocks)
            if slab is None:
                return None
            start = slab * blocks.per_slab
            fresh = torch.arange(start + blocks.per_slab - 1, start - 1, -1, dtype=torch.int32)
            blocks.free_stack[blocks.num_free : blocks.num_free + blocks.per_slab] = fresh
            blocks.num_free += blocks.per_slab
            blocks.slabs.add(slab)
        blocks.num_free -= count
        ordinals = blocks.free_stack[blocks.num_free : blocks.num_free + count].flip(0)
        blocks.refs[ordinals.long()] = 1
        return blocks.ids(ordinals)

    def add_reference(self, blocks: LentBlocks, ids: Tensor) -> None:
        """Count one more owner for each of the distinct ids [n]."""
        blocks.refs[blocks.ordinals(ids)] += 1

    def release(self, blocks: LentBlocks, ids: Tensor) -> None:
        """Count one owner less for each of the distinct ids [n]; blocks without owner become free."""
        ordinals = blocks.ordinals(ids)
        blocks.refs[ordinals] -= 1
        dead = ordinals[blocks.refs[ordinals] == 0]
        blocks.free_stack[blocks.num_free : blocks.num_free + len(dead)] = dead.int()
        blocks.num_free += len(dead)

    def num_owners(self, blocks: LentBlocks, ids: Tensor) -> Tensor:
        """Return how many owners each of ``ids`` [n] has, int32 [n]."""
        return blocks.refs[blocks.ordinals(ids)]

    def mark_cached(self, blocks: LentBlocks, ids: Tensor, cached: bool) -> None:
        """Note that one owner of each of the distinct ids [n] is the prefix cache, or no longer is."""
        ordinals = blocks.ordinals(ids)
        blocks.num_cached += (len(ids) if cached else 0) - int(blocks.in_cache[ordinals].sum())
        blocks.in_cache[ordinals] = cached

    def books(self) -> Books:
        """Return where the bytes are; cheap enough for every step, however large the arena."""
        used = cached = used_kv = 0
        for blocks in self._classes:
            owned, only_cached = blocks.num_owned, blocks.num_only_cached
            used += (owned - only_cached) * blocks.block_bytes
            cached += only_cached * blocks.block_bytes
            used_kv += (owned - only_cached) * blocks.kv_bytes
        return Books(
            total=self.total_bytes,
            used=used,
            cached=cached,
            free=self.total_bytes - used - cached,
            used_kv=used_kv,
            used_sidecars=used - used_kv,
        )

    def check(self) -> None:
        """Assert that the books balance: every block of a lent slab is free or owned, and no block is both."""
        lent = [slab for blocks in self._classes for slab in blocks.slabs]
        assert len(lent) == len(set(lent)), "a slab is lent twice"
        assert sorted(lent + self._empty_slabs) == list(range(self.num_slabs)), "a slab is lost"
        for blocks in self._classes:
            free = blocks.free_stack[: blocks.num_free].long()
            assert len(set(free.tolist())) == blocks.num_free, "a block is free twice"
            assert not blocks.refs[free].any(), "a free block has an owner"
            assert int((blocks.refs > 0).sum()) == blocks.num_owned, "blocks do not add up"
            assert int(blocks.in_cache.sum()) == blocks.num_cached, "cached blocks do not add up"
            assert not (blocks.refs < 0).any(), "a block was released too often"

    def _take_slab(self, taker: LentBlocks) -> int | None:
        if not self._empty_slabs:
            self.return_idle_slabs(taker)
        return self._empty_slabs.pop() if self._empty_slabs else None

    def return_idle_slabs(self, taker: LentBlocks | None = None) -> None:
        """Take back slabs without an owned block from all classes but one, so that any of them may have these next."""
        for blocks in self._classes:
            idle = set() if blocks is taker else blocks.idle_slabs
            if not idle:
                continue
            free = blocks.free_stack[: blocks.num_free]
            gone = torch.isin(free // blocks.per_slab, torch.tensor(sorted(idle), dtype=torch.int32))
            rest = free[~gone].clone()
            blocks.free_stack[: len(rest)] = rest
            blocks.num_free = len(rest)
            blocks.slabs -= idle
            self._empty_slabs += sorted(idle)
