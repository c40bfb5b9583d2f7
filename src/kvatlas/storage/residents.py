"""What the device mirrors of lanes that live on the host: what was chosen stays until its place is needed.

A step brings what it has chosen. What is there already is not fetched again; the others take the places of what was
chosen the longest time ago. What is chosen are *units*: the slots of a lane, or its blocks.

Shapes: R sequences, H lanes of a layer, U places of a lane, n units chosen.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvatlas.core.errors import UnsupportedError
from kvatlas.storage.sequence import LaneRow

_NOTHING = -1
_NEVER = 2**62  # when a place was last used that nothing may come to


class Places(NamedTuple):
    """The places of a layer's lanes: which unit is in each [H, U] int64, -1 for none, and when it was last chosen."""

    held: Tensor
    used: Tensor


@dataclass(eq=False)
class ResidentSet(LaneRow):
    """Device blocks that mirror what one sequence has on the host.

    Args:
        in_use: steps read through them; prompts, which read everything, do not.
        layers: what is where, by the first lane of each layer.
        clock: how often something was brought.
    """

    in_use: bool = False
    layers: dict[int, Places] = field(default_factory=dict)
    clock: int = 0

    def forget(self) -> None:
        """Have nothing: slots hold other tokens now."""
        self.layers.clear()

    def _places(self, lanes: slice, number: int, width: int) -> Places:
        """Return ``number`` places of each lane of a layer, and ``width`` columns: what is behind them is not used."""
        heads = lanes.stop - lanes.start
        held, used = self.layers.get(lanes.start) or Places(*(torch.zeros((2, heads, 0), dtype=torch.int64)))
        fresh = (0, number - held.shape[1])
        held, used = pad(held, fresh, value=_NOTHING), pad(used, fresh)
        return Places(pad(held, (0, width - number), value=_NOTHING), pad(used, (0, width - number), value=_NEVER))


def bring(
    sets: Seq[ResidentSet], lanes: slice, places: Seq[int], unit: Tensor, meant: Tensor, written: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return where chosen units of a layer are from now on, [R, H, n] int64, and which of them must be fetched, bool.

    Args:
        sets: of R sequences.
        lanes: of the layer.
        places: how many each lane of a sequence has.
        unit: [R, H, n] int64, on the CPU, no two that are meant the same.
        meant: bool, which of them are; the others are somewhere, and not fetched.
        written: [R, H] units that the step changes: if not chosen, they are not mirrored any more. None: there is none.

    Raises:
        UnsupportedError: more is chosen than there are places.
    """
    most, now = meant.sum(dim=-1).amax(dim=-1).tolist(), 1 + max(each.clock for each in sets)
    for count, number in zip(most, places, strict=True):
        if count > number:
            raise UnsupportedError(
                f"{count} are chosen of a lane that has {number} places on the device; most_read must say so before"
            )
    width = max(places)  # and one more column, for what is not meant
    all_places = [each._places(lanes, number, width + 1) for each, number in zip(sets, places, strict=True)]
    held, used = (torch.stack(each) for each in zip(*all_places, strict=True))
    known, order = held.sort(dim=-1)
    at = torch.searchsorted(known, unit.contiguous()).clamp(max=width)
    hit = meant & (known.gather(-1, at) == unit)
    found = order.gather(-1, at)
    used.scatter_(-1, torch.where(hit, found, width), now)
    missing = meant & ~hit
    oldest = used[..., :width].argsort(dim=-1, stable=True)
    turn = (missing.cumsum(dim=-1) - 1).clamp(min=0)
    place = torch.where(missing, oldest.gather(-1, turn), torch.where(hit, found, 0))
    target = torch.where(missing, place, width)
    held.scatter_(-1, target, unit)
    used.scatter_(-1, target, now)
    if written is not None:
        stale = (held == written[..., None]) & (used != now)
        held.masked_fill_(stale, _NOTHING)
        used.masked_fill_(stale, 0)
    for each, number, its_held, its_used in zip(sets, places, held, used, strict=True):
        each.layers[lanes.start] = Places(its_held[:, :number], its_used[:, :number])
        each.clock = now
    return place, missing
