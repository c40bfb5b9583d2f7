"""Which cached tokens the next layer will probably attend to, told from partial keys; and how good the guess was.

Shapes: R sequences, H KV heads, G query heads per KV head, S cached slots, Dk elements of a key, r columns of a partial
key, n slots chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.kernels.gather import gather_slots
from kvatlas.models.loading import LoadedModel
from kvatlas.models.rotation import Rotation, rotations_for
from kvatlas.storage.arena import SideClass
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore, side_rows
from kvatlas.workloads.recall import read_filler

_SAMPLE_TOKENS = 1024
_TILE_SLOTS = 4096  # keys of a lane that are rotated at a time


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Slots to read of each lane.

    Args:
        slots: int64 [R, H, n], on the CPU; ascending within what is wanted.
        count: how many of them, int64 [R], the same for all lanes of a sequence.
    """

    slots: Tensor
    count: Tensor

    @property
    def wanted(self) -> Tensor:
        """Which of ``slots`` are not padding, bool [R, H, n]."""
        return (torch.arange(self.slots.shape[-1]) < self.count[:, None, None]).expand_as(self.slots)


def relative_scores(query_RHGD: Tensor, key_RHSD: Tensor, length_R: Tensor, rotation: Rotation) -> Tensor:
    """Return how far each slot scores below its query head's best, float32 [R, H, G, S]; -inf beyond the length.

    Args:
        query_RHGD: queries, or some columns of them.
        key_RHSD: keys, or the same columns of them.
        length_R: slots in use.
        rotation: knows scale and softcap.
    """
    scores = torch.einsum("rhgd,rhsd->rhgs", query_RHGD, key_RHSD) * rotation.scale
    if rotation.softcap is not None:
        scores = rotation.softcap * torch.tanh(scores / rotation.softcap)
    unused = torch.arange(scores.shape[-1], device=scores.device) >= length_R.to(scores.device)[:, None]
    scores = scores.masked_fill(unused[:, None, None], -torch.inf)
    return scores - scores.amax(dim=-1, keepdim=True)


def choose(relative_RHGS: Tensor, alpha: float, most_R: Tensor) -> Choice:
    """Return for each lane the slots that score best for any of its query heads.

    How many: those within ``alpha`` of a query head's best, averaged over all query heads of the layer, rounded up; at
    most ``most_R`` [R], but never so few that a query head would miss its own best slot. What a sequence is given
    depends on its scores alone, not on who shares the batch: equal scores go to the earlier slot, and NaN counts as
    -inf, which is also what pads.
    """
    relative_RHGS = relative_RHGS.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    important = (relative_RHGS > -alpha).sum(dim=-1).float().mean(dim=(1, 2)).ceil().long()
    best = _for_any_head(relative_RHGS)
    favourites = best.isposinf().sum(dim=-1).amax(dim=-1)
    count = torch.minimum(important, most_R.to(important.device)).maximum(favourites).cpu()
    slots = torch.zeros(*best.shape[:2], int(count.max()), dtype=torch.int64)
    choice = Choice(slots=slots, count=count)
    slots[choice.wanted] = best_slots(best, count).nonzero()[:, -1].cpu()  # row by row, so ascending in each lane
    return choice


def _for_any_head(relative_RHGS: Tensor) -> Tensor:
    """Return each slot's score [R, H, S] for the query head that likes it best; a head's favourite has infinity."""
    return relative_RHGS.amax(dim=2).scatter_(-1, relative_RHGS.argmax(dim=-1), torch.inf)


def best_slots(score_RHS: Tensor, count_R: Tensor) -> Tensor:
    """Return which slots of each lane are among its ``count_R`` best, bool [R, H, S]; equal ones by the earlier slot.

    ``topk`` alone would not do: which of equal scores it takes depends on the count and the padding, and so on others.
    """
    count = count_R.to(score_RHS.device)[:, None, None]
    values = score_RHS.topk(int(count_R.max()), dim=-1).values
    last = values.gather(-1, (count - 1).expand(*values.shape[:2], 1))
    above, tied = score_RHS > last, score_RHS == last
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def by_kv_head(query_THqD: Tensor, heads: int) -> Tensor:
    """Return queries [T, Hq, Dk] as [T, H, G, Dk]."""
    return query_THqD.reshape(query_THqD.shape[0], heads, -1, query_THqD.shape[-1])


class Sketch:
    """Partial keys of a layer: some columns of the rotated keys, slot by slot beside the keys on the host.

    Args:
        store: where they lie.
        rotation: of the layer.
        layer: which.
    """

    def __init__(self, store: KVStore, rotation: Rotation, layer: int) -> None:
        self._store = store
        self._rotation = rotation
        self._layer = layer
        self._lanes = store.lanes.slices[layer]

    def weigh(self, seq: Sequence, query_THqD: Tensor, key_THD: Tensor) -> None:
        """Add what a chunk's queries and keys weigh in each rotated column, until the columns are chosen."""
        if self._layer in seq.sketch_columns:
            return
        heads = key_THD.shape[1]
        queries = self._rotation.rotate(by_kv_head(query_THqD, heads).transpose(0, 1).flatten(1, 2))
        keys = self._rotation.rotate(key_THD.transpose(0, 1))
        energy = queries.abs().sum(dim=1) + keys.abs().sum(dim=1)
        before = seq.column_energy.get(self._layer)
        seq.column_energy[self._layer] = energy if before is None else before + energy

    def has_columns(self, seq: Sequence) -> bool:
        """Whether the columns have been chosen."""
        return self._layer in seq.sketch_columns

    def choose_columns(self, seq: Sequence) -> None:
        """Choose the heaviest columns of each lane, from now on."""
        width = self._side(seq).layout.stream("partial").width
        chosen = seq.column_energy.pop(self._layer).topk(width, dim=-1).indices
        seq.sketch_columns[self._layer] = chosen.sort(dim=-1).values

    def write(self, seq: Sequence, first: int, key_HnD: Tensor) -> None:
        """Store the partial keys of slots ``first`` to ``first + n``."""
        for start in range(0, key_HnD.shape[1], _TILE_SLOTS):
            keys = self._cut(seq.sketch_columns[self._layer], key_HnD[:, start : start + _TILE_SLOTS])
            slots = torch.arange(first + start, first + start + keys.shape[1])
            self._put([seq], slots.expand(1, keys.shape[0], -1), keys[None])

    def write_step(self, seqs: Seq[Sequence], slot_R: Tensor, key_RHD: Tensor) -> None:
        """Store the partial key of one new token of each sequence, in slot ``slot_R`` [R]."""
        keys = self._cut(self._columns(seqs), key_RHD[:, :, None])
        self._put(seqs, slot_R[:, None, None].expand(-1, keys.shape[1], 1), keys)

    def relative(self, seqs: Seq[Sequence], query_RHqD: Tensor, length_R: Tensor) -> Tensor:
        """Return the speculated scores below each head's best [R, H, G, S]."""
        columns = self._columns(seqs)
        query = self._cut(columns, by_kv_head(query_RHqD, columns.shape[1]))
        view = self._side(seqs[0]).pool.view("partial")
        most = -(-int(length_R.max()) // self._store.block_size)
        keys = gather_slots(view, self._table(seqs)[..., :most].to(view.device), torch.float32)
        return relative_scores(query, keys, length_R, self._rotation)

    def _cut(self, columns: Tensor, heads: Tensor) -> Tensor:
        """Return the chosen columns [..., H, n, r] of rotated queries or keys [..., H, n, Dk]."""
        rotated = self._rotation.rotate(heads)
        return rotated.gather(-1, columns.unsqueeze(-2).expand(*rotated.shape[:-1], columns.shape[-1]))

    def _put(self, seqs: Seq[Sequence], slots_RHn: Tensor, keys_RHnr: Tensor) -> None:
        view, size = self._side(seqs[0]).pool.view("partial"), self._store.block_size
        block = self._table(seqs).long().gather(-1, slots_RHn // size).to(view.device)
        view[block, (slots_RHn % size).to(view.device)] = keys_RHnr.to(view.dtype)

    def _columns(self, seqs: Seq[Sequence]) -> Tensor:
        return torch.stack([seq.sketch_columns[self._layer] for seq in seqs])

    def _table(self, seqs: Seq[Sequence]) -> Tensor:
        return self._store.table[side_rows(seqs), self._lanes]

    def _side(self, seq: Sequence) -> SideClass:
        side = seq.layout.side_of_layer(self._layer)
        assert side is not None
        return side


class Speculator:
    """What an engine that speculates needs: each layer's rotation, and the account of how well it went.

    Args:
        rotations: one per layer.
    """

    def __init__(self, rotations: Seq[Rotation]) -> None:
        self.rotations = rotations
        self.account: Account | None = None


class Account:
    """How good the guesses were, averaged over steps, layers and sequences; costs a full read of the host each time."""

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

    def note(self, query_RHGD: Tensor, key_RHSD: Tensor, choice: Choice, length_R: Tensor, rotation: Rotation) -> None:
        """Compare a choice with the exact scores.

        Args:
            query_RHGD: the layer's real queries.
            key_RHSD: all cached keys, the new token's behind the last, float32.
            choice: what was read beside the new token.
            length_R: cached tokens, the new one left out.
            rotation: knows scale and softcap.
        """
        exact = relative_scores(query_RHGD, key_RHSD, length_R + 1, rotation)
        probability = exact.exp() / exact.exp().sum(dim=-1, keepdim=True)
        for row, (length, count) in enumerate(zip(length_R.tolist(), choice.count.tolist(), strict=True)):
            chosen = choice.slots[row, :, :count]
            cached = exact[row : row + 1, ..., :length]
            best = best_slots(_for_any_head(cached - cached.amax(dim=-1, keepdim=True)), choice.count[row : row + 1])
            hits = int(best[0].gather(-1, chosen.to(best.device)).sum())
            read = chosen.to(probability.device)[:, None].expand(-1, exact.shape[2], -1)
            read = probability[row].gather(-1, read).sum(dim=-1)
            self._recall += hits / chosen.numel()
            self._mass += float((read + probability[row, ..., length]).mean())
            self._selected += count / length
            self.count += 1

    def _mean(self, total: float) -> float:
        return total / self.count if self.count else math.nan


def make_speculator(model: LoadedModel) -> Speculator:
    """Return the speculator of a model, which from now on shows its layers' inputs; calibrates at the first time.

    Raises:
        UnsupportedError: the model's layers do not foresee each other's queries.
    """
    rotations = rotations_for(model.adapter, _sample_tokens(model))
    model.adapter.watch_inputs()
    return Speculator(rotations)


def _sample_tokens(model: LoadedModel) -> list[int]:
    """Return tokens to calibrate on: text where the model has a tokenizer, else any tokens, always the same."""
    shape = model.adapter.shape
    count = min(_SAMPLE_TOKENS, shape.max_positions)
    if model.tokenizer is not None:
        text = read_filler()[: 8 * count]
        ids: list[int] = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    generator = torch.Generator().manual_seed(0)
    found: list[int] = torch.randint(shape.vocab_size, (count,), generator=generator).tolist()
    return found


Foresee = Callable[[int, slice], Tensor]
"""Returns the queries [n, Hq, Dk] that a later layer would ask for some rows of the batch."""
