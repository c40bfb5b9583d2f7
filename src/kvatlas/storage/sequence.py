"""A sequence's share of the store: rows of the tables, and what is known of it beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from kvatlas.storage.lanes import KVClasses, LaneClasses, SequenceLayout

if TYPE_CHECKING:
    from kvatlas.storage.residents import ResidentSet


@dataclass(eq=False)
class LaneRow:
    """Blocks of lanes: one row of the tables.

    Args:
        row: which.
        layout: the block class of each lane.
        side: blocks of streams beside them, slot by slot; None: there are none.
    """

    row: int
    layout: LaneClasses
    side: LaneRow | None = None

    @property
    def with_side(self) -> list[LaneRow]:
        """It and what lies beside it."""
        return [self] if self.side is None else [self, self.side]


@dataclass(eq=False)
class KVRow(LaneRow):
    """Blocks of keys and values."""

    layout: KVClasses


@dataclass(eq=False)
class Sequence(KVRow):
    """One sequence's share of the store.

    Args:
        row: its row in the tables.
        layout: the block class of each lane.
        seen: tokens appended so far; the next one has this position.
        dense: slot i of a lane holds position start + i.
        shared: some of its blocks may have other owners, so it may not be cut.
        forked: its partly filled last blocks may have other owners, and are copied before the next write.
        starts: position of slot 0 per sliding window, while dense.
        digests: hashes of its full blocks, as far as the prefix cache has needed them.
        reserved: columns of each lane [lanes] that room has been made for, until tokens are appended; else None.
        staging: device blocks that its lanes on the host are read through.
        residents: device blocks that mirror what steps have chosen of these lanes.
        encoded: blocks of its old tokens in a packed format; a lane is what is here, then what is in its own row.
        encodes: whether blocks are encoded once they are old enough; False: not for now.
        records: device blocks of what lanes have one of.
        begun: layers whose stages have been told that the first prompt is over.
        foretold: log-probabilities [V] of what comes next, where they are kept with the tokens that come.
    """

    layout: SequenceLayout
    seen: int = 0
    dense: bool = True
    shared: bool = False
    forked: bool = False
    starts: dict[int, int] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)
    reserved: Tensor | None = None
    staging: LaneRow | None = None
    residents: ResidentSet | None = None
    encoded: KVRow | None = None
    encodes: bool = False
    records: LaneRow | None = None
    begun: set[int] = field(default_factory=set)
    foretold: Tensor | None = None

    @property
    def rows(self) -> list[LaneRow]:
        """All its rows: its own, those of its companions, and what lies beside them."""
        companions = [row for row in (self.staging, self.residents, self.encoded, self.records) if row is not None]
        return [row for each in (self, *companions) for row in each.with_side]

    @property
    def visited(self) -> LaneRow | None:
        """Device blocks that lanes on the host are read through now; None: none live there."""
        return self.residents if self.residents is not None and self.residents.in_use else self.staging

    @property
    def passing(self) -> list[LaneRow]:
        """Rows whose blocks hold nothing that is not elsewhere."""
        return [row for row in (self.staging, self.residents) if row is not None]

    def changed(self) -> None:
        """Let nobody rely on what was mirrored: slots hold other tokens than before."""
        if self.residents is not None:
            self.residents.forget()

    @property
    def parts(self) -> list[KVRow]:
        """Where its keys and values are, in order: encoded ones, then its own."""
        return [self] if self.encoded is None else [self.encoded, self]


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where T new tokens go: slots of their lanes, and those slots' block ids and offsets, each [T, lanes] int64.

    ``side`` are the ids of the blocks beside; None: nothing lies there.
    """

    index: Tensor
    block: Tensor
    offset: Tensor
    side: Tensor | None = None
