"""Column sums over tiles of keys: one batched product and one exponential per tile.

Walks the tiles of chunk attention, a few queries at a time, with float32 accumulation.
Shapes: T queries, Hq query heads, H KV heads, G query heads per KV head, S slots of a tile, D key width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvatlas.core.needs import BELOW_MEAN
from kvatlas.kernels.pool import Part
from kvatlas.kernels.tiles import LOG2_E, Queries, Step, Stream, log2_scores
from kvatlas.kernels.visibility import Sight

_OVER_HEADS = {"max": "amax", "mean": "mean"}


def column_sums(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    past: Sequence[Part],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    reach: tuple[int, int] | None,
    tile_slots: int,
    over: str = "sum",
    heads: str = "sum",
) -> tuple[list[Tensor], Tensor]:
    """As :func:`kvatlas.kernels.column_sums.column_sums`."""
    T, Hq, D = q.shape
    H = k.shape[1]
    G = Hq // H
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_HGTD = q.to(dtype).view(T, H, G, D).permute(1, 2, 0, 3)
    lse_HGT = lse.to(dtype).view(H, G, T) * LOG2_E
    # A query that saw nothing gives nothing: 2 ** (score - inf).
    lse_HGT = lse_HGT.masked_fill(lse_HGT == -torch.inf, torch.inf)
    slots = [part.table.shape[-1] * part.pool.layout.block_size for part in past]
    *past_sums, own_HT = (torch.zeros(H, n, dtype=dtype, device=q.device) for n in (*slots, T))
    stream = Stream(
        queries=Queries.at(positions),
        sight=Sight(window, reach),
        tile_slots=tile_slots,
        dtype=q.dtype,
        numbers_per_pair=G,
    )

    seen_HT = _seen(stream, past, k) if over == "below_mean" else None

    def add(step: Step, sums_HS: Tensor) -> None:
        rows = (step.heads, slice(None), step.rows)
        weights = log2_scores(q_HGTD[rows], step.k.to(dtype), step.mask, scale=scale, softcap=softcap)
        weights.sub_(lse_HGT[rows].unsqueeze(-1)).exp2_()
        place = sums_HS[step.heads, step.first : step.first + step.k.shape[1]]
        if heads != "sum":
            weights = getattr(weights, _OVER_HEADS[heads])(dim=1, keepdim=True)
        if seen_HT is not None:
            below = (weights * seen_HT[step.heads, None, step.rows, None] < BELOW_MEAN).squeeze(1)
            place += (below if step.mask is None else below & (step.mask == 0)).sum(dim=1)
        elif over == "sum":
            place += weights.sum(dim=(1, 2))
        else:  # of no query at all, 0
            torch.maximum(place, weights.sum(dim=1).amax(dim=1), out=place)

    for part, past_HS in zip(past, past_sums, strict=True):
        for step in stream.past(part, values=False):
            add(step, past_HS)
    for step in stream.own(k, None):
        add(step, own_HT)
    return [past_HS.float() for past_HS in past_sums], own_HT.float()


def _seen(stream: Stream, past: Sequence[Part], k: Tensor) -> Tensor:
    """Return how many keys each query sees, float32 [H, T]."""
    seen_HT = torch.zeros(k.shape[1], len(stream.queries.host), device=k.device)
    for step in (*(each for part in past for each in stream.past(part, values=False)), *stream.own(k, None)):
        count = step.k.shape[1] if step.mask is None else (step.mask == 0).sum(dim=-1)
        seen_HT[step.heads, step.rows] += count
    return seen_HT
