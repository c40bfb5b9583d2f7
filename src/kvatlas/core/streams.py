"""What is kept of lanes beside their keys and values: streams of numbers in blocks of their own.

The block that lies beside a block of keys and values holds all its streams, one behind the other: an entry per slot, or
one for the whole block. What there is one of per lane lies in a block of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from kvatlas.core.errors import ConfigError
from kvatlas.core.layout import GRANULE

ELEMENT_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
}  # fmt: skip
"""Bytes of an element by torch's name for its type."""
_ALIGNMENT = 8


class Per(StrEnum):
    """What an entry of a stream is of."""

    SLOT = "slot"
    BLOCK = "block"
    LANE = "lane"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Numbers kept beside keys and values.

    Args:
        name: unique in a layer.
        width: numbers of an entry.
        dtype: their type, as torch calls it.
        per: what an entry is of.
        fill: what a slot, or a lane, begins with; None: its entry is written with its token.

    Raises:
        ConfigError: the type is unknown, or an entry is empty.
    """

    name: str
    width: int = 1
    dtype: str = "float32"
    per: Per = Per.SLOT
    fill: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ConfigError(f"{self.name}: dtype={self.dtype!r} is unknown; take one of {', '.join(ELEMENT_BYTES)}")
        if self.width < 1:
            raise ConfigError(f"{self.name}: an entry of {self.width} numbers holds nothing; give it a width")


@dataclass(frozen=True)
class SideLayout:
    """How a block of streams lies.

    Args:
        streams: in order.
        block_size: slots of the block of keys and values that it lies beside; of what lanes have one of, any.
    """

    streams: tuple[Stream, ...]
    block_size: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values: none."""
        return 0

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a block, rounded up to a cache line."""
        return -(-self._ends[-1] // GRANULE) * GRANULE

    def stream(self, name: str) -> Stream:
        """Return a stream by its name."""
        return next(stream for stream in self.streams if stream.name == name)

    def has(self, name: str) -> bool:
        """Whether there is a stream of this name."""
        return any(stream.name == name for stream in self.streams)

    def offset(self, name: str) -> int:
        """Return where a stream starts inside the block, bytes."""
        index = [stream.name for stream in self.streams].index(name)
        return -(-self._ends[index - 1] // _ALIGNMENT) * _ALIGNMENT if index else 0

    def num_bytes(self, name: str) -> int:
        """Return how many bytes of a block a stream takes."""
        stream = self.stream(name)
        entries = self.block_size if stream.per is Per.SLOT else 1
        return entries * stream.width * ELEMENT_BYTES[stream.dtype]

    @cached_property
    def _ends(self) -> list[int]:
        ends: list[int] = []
        for stream in self.streams:
            start = -(-ends[-1] // _ALIGNMENT) * _ALIGNMENT if ends else 0
            ends.append(start + self.num_bytes(stream.name))
        return ends
