"""Ask a strategy at its moments, and let storage carry out the answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from kvatlas.core.views import LayerView
from kvatlas.core.vocabulary import Moment
from kvatlas.engine.request import Request
from kvatlas.storage.eviction import compact_windows, evict_one, keep_only, lane_view
from kvatlas.storage.lanes import LaneGroup
from kvatlas.storage.store import KVStore
from kvatlas.strategies.strategy import Strategy


def after_prompt_chunk(store: KVStore, request: Request, span_done: bool) -> None:
    """Let the strategy cut the cache after a chunk, or at the end of a prompt."""
    moment = Moment.AFTER_PREFILL if span_done else Moment.AFTER_CHUNK
    if moment in request.strategy.moments:
        _cut(store, request)
    elif request.seq is not None and not request.seq.dense:
        compact_windows(store, request.seq)


def end_prompt(store: KVStore, request: Request) -> None:
    """Give back what only the prompt needed of the staging buffers, once all that goes is gone.

    What stays of the prompt under a strategy that evicts may be encoded from now on.
    """
    if request.seq is not None:
        store.shrink_staging(request.seq, staged_slots(store, request, 1))
        request.seq.residual = residual(request.strategy, in_prompt=False)


def residual(strategy: Strategy, *, in_prompt: bool) -> int | None:
    """Return how many newest tokens of a sequence are not encoded; None: nothing is, for now.

    What will be cut at the end of a prompt is encoded after it: encoded blocks cannot be cut well.
    """
    if strategy.packed is None or strategy.encode is None or (in_prompt and strategy.evicts):
        return None
    return strategy.encode.residual


def staged_slots(store: KVStore, request: Request, count: int) -> int:
    """Return how many slots of each lane a step of ``count`` tokens reads through a staging buffer; 0 without any."""
    assert request.seq is not None
    if request.seq.staging is None:
        return 0
    slots, attend = store.longest_on_host(request.seq), request.strategy.attend
    if attend is not None and request.prefill_end is None:
        slots = attend.most_read(slots, store.lanes.shape.largest_group)
    return slots + count


def after_decode_step(store: KVStore, requests: Seq[Request]) -> None:
    """Let the strategy evict one token from each lane that is full; all requests are of one strategy."""
    strategy, full = requests[0].strategy, []
    if Moment.AFTER_STEP in strategy.moments:
        capacities = {request: strategy.keep.capacity(request.prompt_tokens) for request in requests}
        full = [request for request in requests if (limit := capacities[request]) and request.computed >= limit]
    for request in requests if store.lanes.windows else ():
        if request not in full and request.seq is not None and not request.seq.dense:
            compact_windows(store, request.seq)
    if not full:
        return
    seqs = [request.seq for request in full if request.seq is not None]
    recent = [strategy.keep.recent_tokens(request.prompt_tokens) for request in full]
    limits = torch.tensor([capacities[request] for request in full])
    for group in seqs[0].layout.groups:
        slots = lane_view(store, seqs, group, recent)
        view, live = slots.view, slots.live_BHS
        scores = _scores(strategy, view)
        victims = _lowest(scores.masked_fill(~live, torch.inf), view.positions_BHS).cpu()
        windows = store.lanes.window_of_lane[group.lanes]
        crowded = live.sum(dim=-1).cpu() >= torch.minimum(limits[:, None], windows)
        evict_one(store, seqs, group, victims.masked_fill(~crowded, -1), slots.num_old)


def _cut(store: KVStore, request: Request) -> None:
    """Cut every lane to what the strategy keeps of a prompt.

    Layer by layer, so that the temporary copies stay small.
    """
    keep, seq = request.strategy.keep, request.seq
    most_kept = keep.kept_of_prompt(request.prompt_tokens)
    assert seq is not None
    if most_kept is None or seq.seen <= most_kept:
        return
    recent = [keep.recent_tokens(request.prompt_tokens)]
    for index in store.lanes.shape.owners:
        lanes = store.lanes.slices[index]
        group = LaneGroup(blocks=seq.layout.of_layer(index), lanes=torch.arange(lanes.start, lanes.stop))
        slots = lane_view(store, [seq], group, recent)
        view = slots.view
        window = store.lanes.shape.layers[index].window
        limit = most_kept if window is None else min(most_kept, window - 1)
        scores = _scores(request.strategy, view)[0]
        count = view.valid_BHS[0].sum(dim=-1).clamp(max=limit)
        most = int(count.max())
        kept = _best(scores, view.positions_BHS[0], most)
        unused = torch.arange(most, device=kept.device) >= count[:, None]
        kept = kept.masked_fill(unused, scores.shape[-1]).sort(dim=-1).values
        keep_only(store, seq, group, kept.cpu(), count.cpu(), slots.num_old)


def _scores(strategy: Strategy, view: LayerView) -> Tensor:
    """Return the strategy's scores [B, H, S], lowest where there is no visible token or no number."""
    scores = strategy.keep.scores(view).masked_fill(~view.valid_BHS, -torch.inf)
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _lowest(scores: Tensor, positions: Tensor) -> Tensor:
    """Return the slot with the lowest score [..., S] of each lane; of equal ones that of the oldest token.

    Where slots lie depends on what happened to a lane besides, as being swapped or packed; positions do not.
    """
    lowest = scores == scores.amin(dim=-1, keepdim=True)
    return positions.masked_fill(~lowest, torch.iinfo(positions.dtype).max).argmin(dim=-1)


def _best(scores: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return the slots [H, count] of the highest scores [H, S], best first; of equal ones that of the newest token."""
    newest_first = positions.argsort(dim=-1, descending=True, stable=True)
    order = scores.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return newest_first.gather(-1, order)
