"""Blocks on the host, read through device blocks: fetched layer by layer ahead of the compute, written back behind it.

A sequence with layers on the host has two staging buffers on the device. While a layer reads one, the next layer's
blocks fill the other; new keys and values go to the host in the background. The compute thread waits only for what has
not come yet. Shapes: R sequences, H lanes of a layer, C table columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvatlas.core.observer import NULL, Observer, SpanKind
from kvatlas.core.views import Selection
from kvatlas.core.vocabulary import Per
from kvatlas.engine.request import Request
from kvatlas.storage.arena import BlockClass, copy_blocks
from kvatlas.storage.link import AHEAD, URGENT, Link, Move, Traffic
from kvatlas.storage.residents import bring
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore
from kvatlas.strategies.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Blocks or slots to fetch.

    Args:
        copy: does it.
        num_bytes: how many bytes.
    """

    copy: Callable[[], None]
    num_bytes: int


class Visitors:
    """Sequences of one layout whose layers on the host visit the device together.

    Args:
        store: where keys and values lie.
        plan: of the sequences.
        seqs: the sequences.
        length: slots [R, lanes] int64 to fetch of each lane, on the CPU.
        newest: slots [R, lanes] int64 of a step's new tokens, on the CPU; None: a prompt's, behind all.

    Attributes:
        ahead: fetch a layer before it is needed.
        chooses: what is read is chosen, so no layer is fetched whole ahead.
        late: it is chosen when the layer runs, and fetched then.
    """

    def __init__(
        self, store: KVStore, plan: Plan, seqs: Seq[Sequence], length: Tensor, newest: Tensor | None = None
    ) -> None:
        self.layout = seqs[0].layout
        self.ahead = plan.fetches_ahead
        self.chooses = newest is not None and plan.chooses
        self.late = newest is not None and plan.chooses_late
        self._store = store
        self._plan = plan
        self._newest = newest
        self._length = length
        self._residents = [seq.residents for seq in seqs if seq.residents is not None and seq.residents.in_use]
        self._places: dict[int, Tensor] = {}
        self._stage = store.table[[seq.visited.row for seq in seqs if seq.visited is not None]]
        self._own = self._held(torch.tensor([seq.row for seq in seqs]), length)
        self._old = None
        if self.layout.encoded is not None:
            rows = torch.tensor([seq.encoded.row for seq in seqs if seq.encoded is not None])
            self._old = self._held(rows, store.length[rows])

    def _held(self, rows: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks [R, lanes, C] of some rows, and how many [R, lanes] of each lane are to fetch."""
        columns = -(-length // self._store.block_size)
        return self._store.table[rows, :, : int(columns.max())], columns

    def _of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what `_held` did of a layer that reads the host, cut to its lanes."""
        held = self._own if self._old is None or not self.reads_old(layer) else self._old
        return held[0][:, self._store.lanes.slices[layer]], held[1][:, self._store.lanes.slices[layer]]

    def reads_host(self, layer: int) -> bool:
        """Whether a layer reads lanes on the host."""
        return layer in self.layout.buffers

    def reads_own(self, layer: int) -> bool:
        """Whether these are the blocks of new tokens, too."""
        return self.reads_host(layer) and not self.reads_old(layer)

    def reads_old(self, layer: int) -> bool:
        """Whether these are encoded blocks alone, beside which the others live on the device."""
        return self.reads_host(layer) and self.layout.old_of_layer(layer) is not None

    def stage(self, layer: int) -> tuple[BlockClass, Tensor]:
        """Return the device blocks that a layer is read through, and the table [R, H, C] into them."""
        if self._residents:
            assert self.layout.residents is not None
            return self.layout.residents.of_layer(layer), self._stage[:, self._store.lanes.slices[layer]]
        assert self.layout.staging is not None
        buffer = self.layout.buffers[layer]
        return self.layout.staging.of_layer(buffer), self._stage[:, self._store.lanes.slices[buffer]]

    def stays(self, layer: int) -> bool:
        """Whether what is chosen of a layer stays on the device, wherever there is a place for it."""
        return bool(self._residents) and self.reads_host(layer)

    def places(self, layer: int) -> Tensor:
        """Return where what was brought of a layer is: slots, or columns of its table, [R, H, n] int64, on the CPU.

        In the order of the selection; behind it comes the slot of the new token, where that was not to be chosen.
        """
        return self._places[layer]

    def forget(self) -> None:
        """Rely on nothing that was brought: a move may have broken off."""
        for each in self._residents:
            each.forget()

    def home(self, layer: int) -> tuple[BlockClass, Tensor]:
        """Return the blocks on the host that a layer reads, and the table [R, H, C] into them, on the CPU."""
        return self.layout.old_of_layer(layer) or self.layout.of_layer(layer), self._of(layer)[0]

    def whole(self, layer: int) -> Transfer:
        """Return the transfer of all that a layer reads."""
        if self.stays(layer):
            return self.chosen(layer, self.everything(layer))
        (source, home), (target, stage) = self.home(layer), self.stage(layer)
        columns = self._of(layer)[1]
        most = int(columns.max())
        held = torch.arange(most) < columns[..., None]
        source_ids, target_ids = home[..., :most][held].long(), stage[..., :most][held].long()

        def copy() -> None:
            copy_blocks(source, source_ids, target, target_ids)

        return Transfer(copy=copy, num_bytes=len(source_ids) * source.block_bytes)

    def wanted(self, layer: int, selection: Selection | None) -> Transfer:
        """Return the transfer of what was chosen; None: everything."""
        return self.whole(layer) if selection is None else self.chosen(layer, selection)

    def everything(self, layer: int) -> Selection:
        """Return a selection of all that a layer has on the host."""
        attend = self._plan.layers[layer].attend
        assert attend is not None
        count = self._of(layer)[1]
        if attend.per is Per.SLOT:  # the new token is read beside what is chosen ahead
            count = self._length[:, self._store.lanes.slices[layer]] - int(attend.ahead)
        index = torch.arange(int(count.max())).expand(*count.shape, -1)
        return Selection(per=attend.per, index_RHn=index, count_RH=count)

    def chosen(self, layer: int, selection: Selection) -> Transfer:
        """Return the transfer of chosen slots or blocks of each lane: to its first ones, or to where there is room."""
        index = selection.index_RHn.cpu()
        meant = torch.arange(index.shape[-1]) < selection.count_RH.cpu()[..., None]
        (source, home), (target, stage) = self.home(layer), self.stage(layer)
        per_block = selection.per is Per.BLOCK
        if per_block:
            columns = int(self._of(layer)[1].max())
            if not columns:  # nothing is encoded yet
                return Transfer(copy=lambda: None, num_bytes=0)
            meant &= index < columns  # behind encoded blocks come those that live on the device
            index = index.clamp(max=columns - 1)
        if self.stays(layer):
            index, place, meant = self._bring(layer, selection, index, meant)
        else:
            place = torch.arange(index.shape[-1]).expand_as(index)
        if per_block:
            source_ids, target_ids = home.gather(-1, index)[meant].long(), stage.gather(-1, place)[meant].long()
            return Transfer(
                copy=partial(copy_blocks, source, source_ids, target, target_ids),
                num_bytes=len(source_ids) * source.block_bytes,
            )
        size = self._store.block_size
        read = home.long().gather(-1, index // size)[meant], (index % size)[meant]
        written = stage.long().gather(-1, place // size)[meant], (place % size)[meant]
        written = written[0].to(target.device), written[1].to(target.device)

        def copy() -> None:
            for filled, pool in zip(target.pool.slots, source.pool.slots, strict=True):
                filled[written] = pool[read].to(target.device)

        slot_bytes = source.layout.kv_bytes // source.layout.block_size
        return Transfer(copy=copy, num_bytes=int(meant.sum()) * slot_bytes)

    def _bring(self, layer: int, selection: Selection, index: Tensor, meant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return chosen slots or blocks [R, H, n], the new token's among them, their places, and which are missing."""
        lanes, size = self._store.lanes.slices[layer], self._store.block_size
        newest = None if self._newest is None or self.reads_old(layer) else self._newest[:, lanes]
        units = size if selection.per is Per.SLOT else 1
        if newest is not None and selection.per is Per.BLOCK:
            newest = newest // size
        elif newest is not None and not self.late:
            count = selection.count_RH.cpu()[..., None]
            index, meant = (torch.nn.functional.pad(each, (0, 1)) for each in (index, meant))
            index = index.scatter(-1, count, newest[..., None])
            meant = meant.scatter(-1, count, True)
        sets = self._residents
        places = [int(self._store.columns_held(each)[lanes].min()) * units for each in sets]
        place, missing = bring(sets, lanes, places, index, meant, newest)
        self._places[layer] = place
        if newest is not None and selection.per is Per.SLOT:
            missing &= index != newest[..., None]  # it comes with the step
        return index, place, missing


class Staging:
    """The moves of one forward.

    Args:
        link: the way between the tiers.
        visitors: what visits the device in this forward.
        num_layers: layers of the model.
        observer: is told of moves and waits.
    """

    def __init__(self, link: Link, visitors: Seq[Visitors], num_layers: int, observer: Observer = NULL) -> None:
        self._link = link
        self._visitors = visitors
        self._num_layers = num_layers
        self._observer = observer
        self._fetches: dict[tuple[int, Visitors], Move] = {}
        self._later: dict[tuple[int, Visitors], Transfer] = {}
        self._stores: list[Move] = []
        for layer in range(num_layers):  # the first visit, of which no layer before it can think
            if any(one.reads_host(layer) for one in visitors):
                self._fetch_ahead(layer)
                break

    def bring(self, layer: int, visitors: Visitors, transfer: Transfer) -> None:
        """Fetch chosen slots of a layer that comes next: now, or when it is its turn."""
        if visitors.ahead:
            self._fetches[layer, visitors] = self._submit(layer, [transfer], AHEAD)
        else:
            self._later[layer, visitors] = transfer

    def enter(self, layer: int) -> None:
        """Return when all that a layer reads is on the device; start on the next layer's."""
        if self._visitors:
            with self._observer.span(SpanKind.STAGING, layer):
                self._enter(layer)

    def _enter(self, layer: int) -> None:
        here = [one for one in self._visitors if one.reads_host(layer) and not one.late]
        missing = [one for one in here if (layer, one) not in self._fetches]
        if missing:
            keys = [(layer, one) for one in missing]
            transfers = [self._later.pop(key) if key in self._later else key[1].whole(layer) for key in keys]
            move = self._submit(layer, transfers, URGENT)
            self._fetches |= {(layer, one): move for one in missing}
        self._fetch_ahead(layer + 1, after=layer)
        if here:
            with self._observer.span(SpanKind.WAIT, layer):
                for one in here:
                    self._fetches[layer, one].wait()  # known until it is done, should the wait be broken off
                    del self._fetches[layer, one]

    def fetch(self, layer: int, visitors: Visitors, transfer: Transfer) -> None:
        """Return when something that a layer reads is on the device, fetched now."""
        key = layer, visitors
        self._fetches[key] = self._submit(layer, [transfer], URGENT)
        with self._observer.span(SpanKind.WAIT, layer):
            self._fetches[key].wait()
            del self._fetches[key]

    def store(self, layer: int, transfer: Transfer) -> None:
        """Send something to the host in the background."""
        self._stores.append(
            self._link.stores.submit(
                Move(
                    copy=transfer.copy,
                    num_bytes=transfer.num_bytes,
                    note=self._note(SpanKind.STORE, layer, transfer.num_bytes),
                )
            )
        )

    def finish(self) -> None:
        """Return when everything is where it belongs."""
        if self._stores:
            with self._observer.span(SpanKind.WAIT, -1):
                for move in self._stores:
                    move.wait()

    def abandon(self) -> None:
        """Return when no move is left, after a forward that broke off; those not yet begun are dropped."""
        for visitors in self._visitors:
            visitors.forget()
        for mover, moves in ((self._link.stores, self._stores), (self._link.fetches, self._fetches.values())):
            for move in moves:
                mover.drop(move)
                move.settle()

    def _fetch_ahead(self, layer: int, after: int | None = None) -> None:
        """Order a layer's blocks; into the buffer that layer ``after`` is about to read, nothing can be fetched."""
        if layer >= self._num_layers:
            return
        comers = [one for one in self._visitors if one.reads_host(layer) and one.ahead and not one.chooses]
        chosen = [one for one in comers if (layer, one) not in self._fetches]
        if after is not None:
            chosen = [one for one in chosen if one.layout.buffers.get(after) != one.layout.buffers[layer]]
        if chosen:
            move = self._submit(layer, [one.whole(layer) for one in chosen], AHEAD)
            self._fetches |= {(layer, one): move for one in chosen}

    def _submit(self, layer: int, transfers: Seq[Transfer], priority: int) -> Move:
        """Order one move for all transfers of a layer: a link's latency is paid once, and not for nothing at all."""

        def copy() -> None:
            for transfer in transfers:
                transfer.copy()

        num_bytes = sum(transfer.num_bytes for transfer in transfers)
        if not num_bytes:  # a prompt's first chunk has no past
            nothing = Move(copy=copy, num_bytes=0)
            nothing.run(None, Traffic())
            return nothing
        move = Move(copy=copy, num_bytes=num_bytes, note=self._note(SpanKind.FETCH, layer, num_bytes))
        return self._link.fetches.submit(move, priority)

    def _note(self, kind: SpanKind, layer: int, num_bytes: int) -> Callable[[float, float], None] | None:
        if self._observer is NULL:
            return None
        return partial(self._observer.record, kind, layer, num_bytes=num_bytes)


def staged_slots(store: KVStore, request: Request, count: int) -> int:
    """Return how many slots of each lane a step of ``count`` tokens reads through a staging buffer; 0 without any."""
    assert request.seq is not None
    if request.seq.staging is None:
        return 0
    own, old = store.longest_on_host(request.seq)
    if request.prefill_end is None:
        own, old = request.plan.visiting(own, count), request.plan.visiting(old, 0)
    else:
        own += count
    return max(own, old) if len(request.seq.layout.on_host[0]) else old
