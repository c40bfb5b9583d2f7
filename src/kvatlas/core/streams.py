"""What is kept of lanes beside their keys and values: streams of numbers in blocks of their own.

The block that lies beside a block of keys and values holds all its streams, one behind the other: an entry per slot,
per so many slots, or one for the whole block. What there is one of per lane lies in a block of one slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvatlas.core.errors import ConfigError
from kvatlas.core.layout import GRANULE

ELEMENT_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
}  # fmt: skip
"""Bytes of an element by torch's name for its type."""
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Numbers kept beside keys and values.

    Args:
        name: unique in a layer.
        width: numbers of an entry.
        dtype: their type, as torch calls it.
        every: slots that have an entry together; None: those of a block.
        fill: what a slot, or a lane, begins with; None: its entry is written with its token.

    Raises:
        ConfigError: the type is unknown, or an entry is empty or of no slot.
    """

    name: str
    width: int = 1
    dtype: str = "float32"
    every: int | None = 1
    fill: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ConfigError(f"{self.name}: dtype={self.dtype!r} is unknown; take one of {', '.join(ELEMENT_BYTES)}")
        if self.width < 1:
            raise ConfigError(f"{self.name}: an entry of {self.width} numbers holds nothing; give it a width")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"{self.name}: every={self.every} is no number of slots; write 1 or more")


@dataclass(frozen=True)
class SideLayout:
    """How a block of streams lies.

    Args:
        streams: in order.
        block_size: slots of the block of keys and values that it lies beside; 1 of what lanes have one of.

    Raises:
        ConfigError: a block does not hold whole entries.
    """

    streams: tuple[Stream, ...]
    block_size: int

    def __post_init__(self) -> None:
        for stream in self.streams:
            if stream.every is not None and self.block_size % stream.every:
                raise ConfigError(
                    f"{stream.name}: {stream.every} tokens have one entry, and a block holds {self.block_size}; "
                    "take a number that divides the block size, or another block size (--block-size)"
                )

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

    def entries(self, name: str) -> int:
        """Return how many entries of a stream a block holds."""
        return self.block_size // self.every(name)

    def every(self, name: str) -> int:
        """Return how many slots have an entry of a stream together."""
        return self.stream(name).every or self.block_size

    def offset(self, name: str) -> int:
        """Return where a stream starts inside the block, bytes."""
        index = [stream.name for stream in self.streams].index(name)
        return -(-self._ends[index - 1] // _ALIGNMENT) * _ALIGNMENT if index else 0

    def num_bytes(self, name: str) -> int:
        """Return how many bytes of a block a stream takes."""
        stream = self.stream(name)
        return self.entries(name) * stream.width * ELEMENT_BYTES[stream.dtype]

    @cached_property
    def _ends(self) -> list[int]:
        ends: list[int] = []
        for stream in self.streams:
            start = -(-ends[-1] // _ALIGNMENT) * _ALIGNMENT if ends else 0
            ends.append(start + self.num_bytes(stream.name))
        return ends
