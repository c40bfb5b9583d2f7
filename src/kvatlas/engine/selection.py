"""What a decode step reads where a stage has chosen, and how good the choice was.

Shapes: R sequences, H KV heads, G query heads per KV head, C table columns, S slots, n chosen, Dk elements of a key.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kvatlas.core.views import Selection
from kvatlas.core.vocabulary import Per
from kvatlas.engine.sources import Blocks
from kvatlas.kernels.blocks import read_keys
from kvatlas.kernels.choosing import cut_blocks
from kvatlas.kernels.gather import gather_slots
from kvatlas.kernels.pool import Part
from kvatlas.models.attention import AttentionCall


def wanted(selection: Selection) -> Tensor:
    """Return which of a selection's indices are not padding, bool [R, H, n]."""
    index = selection.index_RHn
    return torch.arange(index.shape[-1], device=index.device) < selection.count_RH.to(index.device)[..., None]


def chosen_blocks(cached: Blocks, part: Part, selection: Selection, first: int) -> Part:
    """Return a part cut to the chosen ones of its blocks.

    Args:
        cached: the blocks of the part.
        part: all of them.
        selection: of blocks, in order, of which the part's are numbered from ``first`` on.
        first: as above.
    """
    size = cached.blocks.layout.block_size
    table, read = cut_blocks(cached.table, cached.length, selection.index_RHn, selection.count_RH, first, size)
    return replace(part, table=table, length=read, dense_start=None)


def chosen_slots(cached: Blocks, selection: Selection, newest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the slots [R, H, n] int32 that a step reads, and how many of them [R, H] are meant.

    Args:
        cached: the lanes' blocks.
        selection: of slots.
        newest: [R, H] slots of the new tokens, which are read beside those; None: they are among them.
    """
    index, count = selection.index_RHn, selection.count_RH
    index = index.clamp(max=cached.table.shape[-1] * cached.blocks.layout.block_size - 1)
    if newest is not None:
        index = torch.cat([index, index[..., :1]], dim=-1)
        index.scatter_(-1, count[..., None].to(index.device), newest[..., None].to(index.device))
        count = count + 1
    return index.int(), count.to(cached.length.device)


def place_of(index: Tensor, selection: Selection) -> Tensor:
    """Return at which place [R, H], on the CPU, a selection names ``index`` [R, H]; it does."""
    return (selection.index_RHn == index.to(selection.index_RHn.device)[..., None]).int().argmax(dim=-1).cpu()


class Probe:
    """How good choices were, averaged over steps, layers and sequences; costs a full read of all keys each time."""

    def __init__(self) -> None:
        self.count = 0
        self._recall = self._mass = self._selected = 0.0

    @property
    def recall(self) -> float:
        """Share of the tokens that exact scores would have chosen, as many per lane, that were chosen."""
        return self._mean(self._recall)

    @property
    def mass(self) -> float:
        """Share of the exact attention probability that falls on what was read, the new token included."""
        return self._mean(self._mass)

    @property
    def selected_fraction(self) -> float:
        """Chosen tokens per cached token."""
        return self._mean(self._selected)

    def note(self, score_RHGS: Tensor, read_RHS: Tensor, length_RH: Tensor, newest_RH: Tensor) -> None:
        """Compare a choice with the exact scores.

        Args:
            score_RHGS: of all slots, as the softmax takes them; -inf where there is no token.
            read_RHS: which slots were chosen, bool; whether that of the newest token is, does not matter.
            length_RH: slots in use.
            newest_RH: slot of the newest token, which is read in any case.
        """
        probability = score_RHGS.softmax(dim=-1)
        newest = torch.zeros_like(read_RHS).scatter_(-1, newest_RH[..., None], True)
        chosen = read_RHS & ~newest
        mass = probability.masked_fill(~(chosen | newest)[:, :, None], 0).sum(dim=-1).mean(dim=(1, 2))
        below = score_RHGS.masked_fill(newest[:, :, None], -torch.inf)
        below = below - below.amax(dim=-1, keepdim=True)
        best = below.amax(dim=2).scatter_(-1, below.argmax(dim=-1), torch.inf)
        for row in range(len(best)):
            hits = number = 0
            for lane in range(best.shape[1]):
                count = int(chosen[row, lane].sum())
                top = best[row, lane].sort(descending=True, stable=True).indices[:count]
                hits, number = hits + int(chosen[row, lane][top].sum()), number + count
            cached = (length_RH[row] - 1).clamp(min=1)
            self._recall += hits / max(1, number)
            self._mass += float(mass[row])
            self._selected += float((chosen[row].sum(dim=-1).to(cached.device) / cached).mean())
            self.count += 1

    def _mean(self, total: float) -> float:
        return total / self.count if self.count else math.nan


def slots_of(selection: Selection, slots: int, block_size: int) -> Tensor:
    """Return which of ``slots`` slots of each lane a selection names, bool [R, H, slots]."""
    index = selection.index_RHn
    number = slots if selection.per is Per.SLOT else -(-slots // block_size)
    named = torch.zeros(*index.shape[:-1], number + 1, dtype=torch.bool, device=index.device)
    named.scatter_(-1, index.masked_fill(~wanted(selection), number), True)
    named = named[..., :number]
    return named if selection.per is Per.SLOT else named.repeat_interleave(block_size, dim=-1)[..., :slots]


def note_choice(
    probe: Probe,
    call: AttentionCall,
    selection: Selection,
    q: Tensor,
    k: Tensor,
    own: Blocks,
    old: Blocks | None,
    slot: Tensor,
) -> None:
    """Compare a choice with the exact scores over all that is cached."""
    parts, device = [own] if old is None else [old, own], q.device
    keys, live = [], []
    for part in parts:
        keys.append(read_keys(part.blocks.pool, part.table.to(part.blocks.device), torch.float32).to(device))
        used = torch.arange(keys[-1].shape[2], device=device) < part.length[..., None]
        if part is old:
            used &= gather_slots(part.blocks.positions, part.table) >= 0
        live.append(used)
    newest = (slot + sum(each.shape[2] for each in keys[:-1])).to(device)
    every, held = torch.cat(keys, dim=2), torch.cat(live, dim=2)
    every.scatter_(2, newest[..., None, None].expand(*newest.shape, 1, k.shape[-1]), k.float()[:, :, None])
    queries = q.float().reshape(len(q), k.shape[1], -1, q.shape[-1])
    scores = torch.einsum("rhgd,rhsd->rhgs", queries, every) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~held[:, :, None], -torch.inf)
    read = slots_of(selection, scores.shape[-1], own.blocks.layout.block_size).to(device) & held
    probe.note(scores, read, held.sum(dim=-1), newest)
