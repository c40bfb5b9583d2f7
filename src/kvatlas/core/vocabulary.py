"""The words every part of kvatlas shares: axes, moments, needs, sidecars, formats, tiers."""

from __future__ import annotations

from enum import StrEnum


class Axis(StrEnum):
    """The question a stage answers. A strategy has at most one stage per axis."""

    KEEP = "keep"
    ENCODE = "encode"
    PLACE = "place"
    ATTEND = "attend"
    WHEN = "when"
    BUDGET = "budget"


class Moment(StrEnum):
    """A point in the life of a request at which a stage may act."""

    BEFORE_LAYER = "before_layer"
    SELECT = "select"
    AFTER_LAYER = "after_layer"
    AFTER_CHUNK = "after_chunk"
    AFTER_PREFILL = "after_prefill"
    AFTER_STEP = "after_step"
    ON_PRESSURE = "on_pressure"


class Need(StrEnum):
    """Something that must be computed for a stage while queries and keys are at hand; gone later."""

    COLUMN_SUMS = "column_sums"
    ROTATION = "rotation"


class Tier(StrEnum):
    """Where bytes live. Without an accelerator both tiers are RAM, and a move between them is a copy."""

    DEVICE = "device"
    HOST = "host"


class Sidecar(StrEnum):
    """Data that storage carries beside the keys and values of a block; its bytes are shown apart."""

    POSITIONS = "positions"
    COLUMN_SUMS = "column_sums"


class Saves(StrEnum):
    """What a stage lowers."""

    CAPACITY = "capacity"
    BANDWIDTH = "bandwidth"


class Format(StrEnum):
    """How the elements of keys and values are stored."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def element_bytes(self) -> int:
        """Bytes of one stored element."""
        return 4 if self is Format.FP32 else 2


SIDECAR_SLOT_BYTES = 4
"""Bytes of one sidecar entry of one slot: an int32 position or a float32 sum."""
