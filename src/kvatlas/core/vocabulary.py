"""The words every part of kvatlas shares: axes, moments, formats, tiers."""

from __future__ import annotations

from enum import StrEnum


class Axis(StrEnum):
    """The question a stage answers. A layer has at most one stage per axis."""

    KEEP = "keep"
    BUDGET = "budget"
    ENCODE = "encode"
    PLACE = "place"
    ATTEND = "attend"


class Moment(StrEnum):
    """A point in the life of a request at which a stage acts."""

    BEFORE_LAYER = "before_layer"
    SELECT = "select"
    AFTER_CHUNK = "after_chunk"
    AFTER_PREFILL = "after_prefill"
    AFTER_STEP = "after_step"


class Per(StrEnum):
    """What a stage chooses."""

    SLOT = "slot"
    BLOCK = "block"


class Tier(StrEnum):
    """Where bytes live. Without an accelerator both tiers are RAM, and a move between them is a copy."""

    DEVICE = "device"
    HOST = "host"


class Saves(StrEnum):
    """What a stage lowers."""

    CAPACITY = "capacity"
    BANDWIDTH = "bandwidth"


class Format(StrEnum):
    """How the elements of keys and values are stored.

    ``int8`` has a scale per token; ``int4`` and ``int2`` have a scale and a minimum per key channel of a block, and
    per token and 32 value channels (KIVI's layout). Codes of ``int4`` and ``int2`` are packed; see `core.layout`.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @property
    def bits(self) -> int:
        """Bits of one stored element, scales left out."""
        return _BITS[self]

    @property
    def is_float(self) -> bool:
        """Whether elements are floating-point numbers, so that no scale goes with them."""
        return self in _FLOATS

    @property
    def is_packed(self) -> bool:
        """Whether elements share bytes, so that a block is written whole or not at all."""
        return self in _PACKED

    @property
    def element_bytes(self) -> int:
        """Bytes of one stored element, where it has bytes of its own."""
        assert not self.is_packed, f"{self.value} packs several elements into a byte"
        return self.bits // 8


_BITS = {Format.FP32: 32, Format.BF16: 16, Format.FP16: 16, Format.INT8: 8, Format.INT4: 4, Format.INT2: 2}
_FLOATS = frozenset({Format.FP32, Format.BF16, Format.FP16})
_PACKED = frozenset({Format.INT4, Format.INT2})
