"""Keys and values for decode attention: paged blocks in random order, and the same numbers in contiguous tensors.

Shapes: L layers, B sequences, H KV heads, S slots of a lane, C columns of its table, s slots of a block, D head_dim.
A form walks over as many layers as fill ``cold_bytes``, as a model does between two steps: no lane is in a cache when
it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.core.layout import DEFAULT_BLOCK_SIZE, GRANULE, BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import encode_blocks
from kvatlas.kernels.pool import BlockPool, Part
from kvatlas.storage.pages import advise_huge_pages

COLD_BYTES = 256 * 2**20
_DISTINCT_BLOCKS = 2048
_BLOCK = DEFAULT_BLOCK_SIZE


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The shape of one cell.

    Args:
        batch: sequences.
        context: slots of each lane, a multiple of 32.
        query_heads: per layer.
        kv_heads: per layer.
        head_dim: elements of a key and of a value.
        cold_bytes: bytes that a form walks over before it reads a lane again.
    """

    batch: int
    context: int
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    cold_bytes: int = COLD_BYTES

    @property
    def blocks(self) -> int:
        """Blocks of one layer."""
        return self.batch * self.kv_heads * self.context // _BLOCK

    @property
    def flop(self) -> float:
        """Multiplications and additions of one layer's attention: scores and weighted values."""
        return 4.0 * self.batch * self.query_heads * self.context * self.head_dim

    def layout(self, format: Format) -> BlockLayout:
        """Return how a block lies in a format; without sidecars."""
        return BlockLayout(
            key_dim=self.head_dim, value_dim=self.head_dim, format=format, block_size=_BLOCK, positions=False
        )

    def layer_bytes(self, format: Format) -> int:
        """Return the bytes that must be read for one layer: codes and parameters of all keys and values."""
        return self.blocks * self.layout(format).kv_bytes

    def layers(self, format: Format) -> int:
        """Return the layers that a form in this format walks over."""
        return max(1, -(-self.cold_bytes // self.layer_bytes(format)))

    def held_bytes(self, format: Format) -> int:
        """Return the bytes that these layers take."""
        return self.layers(format) * self.blocks * self.layout(format).block_bytes

    def query(self) -> Tensor:
        """Return queries [B, Hq, D], equal for equal shapes."""
        return torch.randn(self.batch, self.query_heads, self.head_dim, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Content:
    """What the lanes hold: few distinct blocks, again and again, so that filling gigabytes takes no time.

    Args:
        keys: [n, s, D].
        values: [n, s, D].
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, lanes: Lanes) -> Content:
        """Return normal numbers, equal for equal shapes."""
        count = min(_DISTINCT_BLOCKS, lanes.blocks)
        generator = torch.Generator().manual_seed(0)
        keys, values = torch.randn(2, count, _BLOCK, lanes.head_dim, generator=generator).unbind()
        return cls(keys, values)

    def paged(self, lanes: Lanes, format: Format) -> list[Part]:
        """Return one part per layer; the blocks of all layers lie in one arena, in random order."""
        layout, layers, count = lanes.layout(format), lanes.layers(format), len(self.keys)
        copies, step = -(-layers * lanes.blocks // count), layout.block_bytes // GRANULE
        distinct = BlockPool(torch.zeros(count * layout.block_bytes, dtype=torch.uint8), layout)
        encode_blocks(distinct, torch.arange(count) * step, self.keys, self.values)
        memory = torch.empty(copies * count * layout.block_bytes, dtype=torch.uint8)
        advise_huge_pages(memory)  # as the engine's arena is
        rows, places = memory.view(copies, count, -1), torch.empty(copies, count, dtype=torch.int32)
        generator = torch.Generator().manual_seed(2)
        for copy in range(copies):  # place i of a copy holds block order[i]
            order = torch.randperm(count, generator=generator)
            torch.index_select(distinct.memory.view(count, -1), 0, order, out=rows[copy])
            places[copy, order] = torch.arange(copy * count, (copy + 1) * count, dtype=torch.int32)
        among = torch.rand(copies, count, generator=generator).argsort(dim=0)  # which copy an entry reads
        entries = places.gather(0, among).flatten()[: layers * lanes.blocks] * step
        tables = entries.view(layers, lanes.batch, lanes.kv_heads, -1)
        pool, length = BlockPool(memory, layout), torch.full((lanes.batch, lanes.kv_heads), lanes.context)
        return [Part(pool=pool, table=table, length=length, dense_start=0) for table in tables]

    def contiguous(self, lanes: Lanes, dtype: torch.dtype, layers: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [L, B, H, S, D], in the order in which `paged` has them."""
        order = torch.arange(layers * lanes.blocks) % len(self.keys)
        shape = (layers, lanes.batch, lanes.kv_heads, lanes.context, lanes.head_dim)
        keys, values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        for filled, stored in ((keys, self.keys), (values, self.values)):
            advise_huge_pages(filled.view(-1).view(torch.uint8))  # no worse off than our blocks
            torch.index_select(stored.to(dtype), 0, order, out=filled.view(-1, *stored.shape[1:]))
        return keys, values

    def of_sequence(self, lanes: Lanes, sequence: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [H, S, D] of one sequence of the first layer, float32."""
        blocks = lanes.blocks // lanes.batch
        order = torch.arange(sequence * blocks, (sequence + 1) * blocks) % len(self.keys)
        shape = (lanes.kv_heads, lanes.context, lanes.head_dim)
        return self.keys[order].view(shape), self.values[order].view(shape)
