"""Ask a strategy at its moments how many tokens go, and which; let storage carry out the answer.

Lanes of many layers and requests are looked at together, tile by tile: a tile holds whole layers, and only so many
slots that what is read or moved of it stays small. Shapes as in `kvatlas.core.views`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence as Seq
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvatlas.core.views import LaneView
from kvatlas.core.vocabulary import Moment
from kvatlas.engine.request import Request
from kvatlas.engine.segments import sequence_of
from kvatlas.storage.eviction import LaneSlots, compact_windows, cut, lane_slots, open_holes
from kvatlas.storage.lanes import KVGroup
from kvatlas.storage.prefix_cache import PrefixCache
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore
from kvatlas.storage.tables import NO_LIMIT
from kvatlas.strategies.plan import LayerPlan
from kvatlas.strategies.stage import Keep, Limits

_TILE_BYTES = 32 << 20
"""Keys and values of a tile whose tokens are moved, or whose keys are looked at."""
_TILE_SLOTS = 4 << 20
"""Slots of a tile where only what is known of tokens is looked at."""


@dataclass(frozen=True)
class _Acting:
    """Lanes that one stage looks after and whose blocks are of one class; all layers have as many heads.

    Args:
        layers: plans of the layers, in order.
        group: their lanes and blocks.
    """

    layers: tuple[LayerPlan, ...]
    group: KVGroup

    @property
    def keep(self) -> Keep:
        """The stage; those of other requests of the same kind differ in their budgets at most."""
        return self.layers[0].keep

    @property
    def heads(self) -> int:
        """Lanes of one layer."""
        return self.layers[0].shape.num_kv_heads

    def tile(self, first: int, count: int) -> _Acting:
        """Return some of the layers."""
        lanes = self.group.lanes[first * self.heads : (first + count) * self.heads]
        return _Acting(self.layers[first : first + count], self.group.only(lanes))


class Evictor:
    """Cuts lanes to what their strategies allow.

    Args:
        store: where they lie.
        prefixes: what is left to others when a prompt is cut; None: nothing is shared.
    """

    def __init__(self, store: KVStore, prefixes: PrefixCache | None = None) -> None:
        self._store = store
        self._prefixes = prefixes
        self._acting: dict[tuple[int, int], list[_Acting]] = {}
        self._reads: dict[type[Keep], bool] = {}  # which of the stages seen have read keys or values

    def act(self, moment: Moment, requests: Seq[Request]) -> None:
        """Cut all lanes that hold more than they may at a moment.

        Args:
            moment: the same for all.
            requests: those that a chunk, a prompt or a step has just ended for.
        """
        kinds: dict[Hashable, list[Request]] = {}
        for request in requests:
            kinds.setdefault(request.plan.kind, []).append(request)
        for alike in kinds.values():
            if alike[0].plan.evicts:
                if moment is Moment.AFTER_STEP:
                    self._after_step(alike)
                else:
                    self._after_tokens(alike, prompt_over=moment is Moment.AFTER_PREFILL)
            if self._store.lanes.windows:
                self._compact(alike, in_steps=moment is Moment.AFTER_STEP)

    # After a chunk or a prompt

    def _after_tokens(self, requests: list[Request], *, prompt_over: bool) -> None:
        """Cut to what may remain of a prompt, and note at how many tokens the steps to come will cut."""
        for acting in self._acting_lanes(requests[0]):
            if not prompt_over and not acting.keep.streams:
                continue
            if prompt_over:
                self._limit(requests, acting)
            least = _per_layer(requests, acting, lambda limits: _or_all(limits.after_prompt)).amin(dim=1).tolist()
            due = [each for each, kept in zip(requests, least, strict=True) if sequence_of(each).seen > kept]
            for some, tile in self._tiles(due, acting, moves=True):
                self._cut_tile(some, tile)

    def _limit(self, requests: Seq[Request], acting: _Acting) -> None:
        rows = _rows([sequence_of(request) for request in requests])
        high = _per_layer(requests, acting, lambda limits: _or_all(limits.high))
        self._store.tables.set_limits(rows, acting.group.lanes, high.repeat_interleave(acting.heads, dim=1))

    def _cut_tile(self, requests: list[Request], acting: _Acting) -> None:
        store, seqs = self._store, [sequence_of(request) for request in requests]
        slots, view, scores = self._look(requests, acting)
        kept = _per_layer(requests, acting, lambda limits: _or_all(limits.after_prompt))
        target = kept.repeat_interleave(acting.heads, dim=1)
        budget = acting.layers[0].budget
        if budget is not None and budget.ragged:
            counts = budget.counts(view.by_layer(scores), kept.to(scores.device)).cpu()
            if bool((counts.sum(dim=-1) > kept * acting.heads).any()):
                raise ValueError(f"{budget} gives the heads of a layer more than they may keep together")
            even, target = target, counts.flatten(1)
            limit = store.tables.limit[_rows(seqs)[:, None], acting.group.lanes]
            limit = torch.where(limit < NO_LIMIT, limit + target - even, NO_LIMIT)
            store.tables.set_limits(_rows(seqs), acting.group.lanes, limit)
        windows = store.lanes.window_of_lane[acting.group.lanes]
        self._keep_best(seqs, acting, slots, view, scores, torch.minimum(target, windows - 1))

    def _keep_best(
        self, seqs: list[Sequence], acting: _Acting, slots: LaneSlots, view: LaneView, scores: Tensor, target: Tensor
    ) -> None:
        """Keep the ``target`` [B, H] best slots of each lane."""
        count = torch.minimum(view.valid_BHS.sum(dim=-1).cpu(), target)
        most = int(count.max())
        kept = _best(scores, view.positions_BHS, most)
        unused = torch.arange(most) >= count[..., None]
        kept = kept.cpu().masked_fill(unused, scores.shape[-1]).sort(dim=-1).values
        cut(self._store, seqs, acting.group, kept, count, slots.num_old, self._prefixes)

    # After a step

    def _after_step(self, requests: list[Request]) -> None:
        """Evict from lanes that are full: one token, whose slot the next one takes, or all that is too much."""
        for acting in self._acting_lanes(requests[0]):
            due = self._due(requests, acting)
            full = [request for request, one in zip(requests, due.any(dim=1).tolist(), strict=True) if one]
            for some, tile in self._tiles(full, acting, moves=False):
                self._evict(some, tile)

    def _due(self, requests: Seq[Request], acting: _Acting) -> Tensor:
        """Return which lanes [B, H] may be full; whether those with encoded blocks are, only a look at these tells."""
        store, lanes = self._store, acting.group.lanes
        seqs = [sequence_of(request) for request in requests]
        rows = _rows(seqs)[:, None]
        held = store.length[rows, lanes] - (store.hole[rows, lanes] >= 0).long()
        encoded = [seq.encoded.row for seq in seqs if seq.encoded is not None]
        if encoded:
            held += store.length[torch.tensor(encoded)[:, None], lanes]
        seen = torch.tensor([seq.seen for seq in seqs])[:, None]
        limit = store.tables.limit[rows, lanes]
        return (seen >= limit) & (held >= torch.minimum(limit, store.lanes.window_of_lane[lanes]))

    def _evict(self, requests: list[Request], acting: _Acting) -> None:
        store, seqs = self._store, [sequence_of(request) for request in requests]
        slots, view, scores = self._look(requests, acting)
        rows, lanes = _rows(seqs)[:, None], acting.group.lanes
        limit, seen = store.tables.limit[rows, lanes], torch.tensor([seq.seen for seq in seqs])[:, None]
        most = torch.minimum(limit, store.lanes.window_of_lane[lanes])
        live = slots.live.sum(dim=-1).cpu()
        full = (seen >= limit) & (live >= most)
        drop = [_drop(_keep(request, acting).limits(request.prompt_tokens)) for request in requests]
        if max(drop) > 1:
            target = torch.minimum(limit - torch.tensor(drop)[:, None], most - 1).clamp(min=0)
            target = torch.where(full, target, NO_LIMIT)
            self._keep_best(seqs, acting, slots, view, scores, target)
            return
        for seq in seqs:  # of a prompt shorter than the budget, the cache has blocks that the next token is written to
            if seq.shared and self._prefixes is not None:
                self._prefixes.withdraw(seq)
                seq.shared = False
        victims = _lowest(scores, view.positions_BHS, slots.live).cpu()
        open_holes(store, seqs, acting.group, victims.masked_fill(~full, -1), slots.num_old)

    # Looking

    def _look(self, requests: list[Request], acting: _Acting) -> tuple[LaneSlots, LaneView, Tensor]:
        """Return the slots of a tile, what a stage may see of them, and its scores, lowest where there is no token."""
        store = self._store
        seqs = [sequence_of(request) for request in requests]
        slots = lane_slots(store, seqs, acting.group)
        on = slots.live.device
        seen = torch.tensor([seq.seen for seq in seqs], device=on)
        recent = [_keep(request, acting).recent_tokens(request.prompt_tokens) for request in requests]
        oldest = seen[:, None] - store.lanes.window_of_lane[acting.group.lanes].to(on)
        view = LaneView(
            layer_H=torch.tensor([layer.index for layer in acting.layers], device=on).repeat_interleave(acting.heads),
            factors=[layer.shape.factor for layer in acting.layers],
            heads=acting.heads,
            num_layers=len(store.lanes.shape.layers),
            positions_BHS=slots.positions,
            valid_BHS=slots.live & (slots.positions > oldest[..., None]),
            seen_B=seen,
            prompt_B=torch.tensor([request.prompt_tokens for request in requests], device=on),
            recent_B=torch.tensor(recent, device=on),
            side=slots.side,
            read=slots.read,
            group=acting.layers[0].shape.group,
            key_dim=acting.layers[0].shape.key_dim,
            softcap=acting.layers[0].shape.softcap,
            records=partial(self._record, seqs, acting),
        )
        given = _keep(requests[0], acting).scores(view)
        # What is no number goes first, but after slots that hold nothing to be kept.
        least = torch.finfo(given.dtype).min
        scores = given.nan_to_num(nan=least, posinf=torch.inf, neginf=least).masked_fill(~view.valid_BHS, -torch.inf)
        self._reads[type(acting.keep)] = self._reads.get(type(acting.keep), False) or view.has_read
        return slots, view, scores

    def _record(self, seqs: Seq[Sequence], acting: _Acting, name: str) -> Tensor:
        """Return what lanes have one of, [B, H, width]."""
        kept = seqs[0].layout.records_of_layer(acting.layers[0].index)
        assert kept is not None, f"{acting.keep.name} asks for {name!r} and does not say so in its needs"
        return kept.pool.view(name)[self._store.record_ids(seqs, acting.group.lanes).to(kept.device), 0].float()

    def _tiles(
        self, requests: list[Request], acting: _Acting, *, moves: bool
    ) -> Iterator[tuple[list[Request], _Acting]]:
        """Yield the requests and layers that are looked at together.

        A stage is found out to read keys by the first tiles that it is shown, which are therefore small.
        """
        if not requests:
            return
        rows = [row.row for request in requests for row in sequence_of(request).parts]
        longest = int(self._store.length[rows][:, acting.group.lanes].amax())
        layout, heads = acting.group.blocks.layout, acting.heads
        slot_bytes = max(1, layout.kv_bytes // layout.block_size)
        small = moves or self._reads.get(type(acting.keep), True)
        limit = _TILE_BYTES // slot_bytes if small else _TILE_SLOTS
        some = max(1, limit // max(1, heads * longest))
        for first in range(0, len(requests), some):
            part = requests[first : first + some]
            layers = max(1, limit // max(1, len(part) * heads * longest))
            for start in range(0, len(acting.layers), layers):
                yield part, acting.tile(start, layers)

    def _acting_lanes(self, request: Request) -> list[_Acting]:
        """Return the lanes that requests of one kind may evict from, those together that can be looked at together."""
        plan, layout = request.plan, sequence_of(request).layout
        key = plan.kind, id(layout)
        if key not in self._acting:
            found: dict[Hashable, list[LayerPlan]] = {}
            for layer in plan.owned:
                if layer.evicts:
                    budget = None if layer.budget is None else layer.budget.kind
                    group = layout.group_of_layer(layer.index)
                    stored = group.blocks, group.old, group.side, group.derived, layout.records_of_layer(layer.index)
                    together = layer.keep.kind, budget, layer.shape.num_kv_heads, layer.shape.softcap, *stored
                    found.setdefault(together, []).append(layer)
            self._acting[key] = [
                _Acting(
                    tuple(layers),
                    layout.group_of_layer(layers[0].index).only(
                        self._store.lanes.lanes_of([layer.index for layer in layers])
                    ),
                )
                for layers in found.values()
            ]
        return self._acting[key]

    # Windows

    def _compact(self, requests: Seq[Request], *, in_steps: bool) -> None:
        """Drop what windows have passed in sequences that were cut; from full lanes, steps evict token by token."""
        for request in requests:
            seq = sequence_of(request)
            if not seq.dense:
                full = self._store.tables.limit[seq.row] <= seq.seen
                due = ~full if in_steps else torch.ones_like(full)
                compact_windows(self._store, seq, due, self._prefixes)


def _layers(request: Request, acting: _Acting) -> list[LayerPlan]:
    """Return a request's own plans of some layers."""
    return [request.plan.layers[layer.index] for layer in acting.layers]


def _keep(request: Request, acting: _Acting) -> Keep:
    """Return a request's own stage for some layers."""
    return request.plan.layers[acting.layers[0].index].keep


def _per_layer(requests: Seq[Request], acting: _Acting, which: Callable[[Limits], int]) -> Tensor:
    """Return a number [B, L] of each layer's limits, under each request's own budget."""
    return torch.tensor(
        [[which(layer.limits(request.prompt_tokens)) for layer in _layers(request, acting)] for request in requests]
    )


def _or_all(tokens: int | None) -> int:
    return NO_LIMIT if tokens is None else tokens


def _drop(limits: Limits) -> int:
    """Return how many tokens a full lane loses."""
    return 1 if limits.high is None or limits.low is None else limits.high - limits.low


def _rows(seqs: Seq[Sequence]) -> Tensor:
    return torch.tensor([seq.row for seq in seqs])


def _lowest(scores: Tensor, positions: Tensor, live: Tensor) -> Tensor:
    """Return the live slot with the lowest score [..., S] of each lane; of equal ones that of the oldest token.

    Where slots lie depends on what happened to a lane besides, as being swapped or packed; positions do not.
    """
    lowest = live & (scores == scores.masked_fill(~live, torch.inf).amin(dim=-1, keepdim=True))
    return positions.masked_fill(~lowest, torch.iinfo(positions.dtype).max).argmin(dim=-1)


def _best(scores: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return the slots [.., count] of the highest scores [.., S], best first; of equals the newest token's."""
    newest_first = positions.argsort(dim=-1, descending=True, stable=True)
    order = scores.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return newest_first.gather(-1, order)
