"""What a decode step pays to the slots that it attends to, where that is more than a sum over queries and heads.

Shapes: R sequences, Hq query heads, H KV heads, S slots of a part.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from kvatlas.core.needs import BELOW_MEAN, Received
from kvatlas.kernels.decode_attention import decode_attention
from kvatlas.kernels.pool import Part
from kvatlas.kernels.visibility import slot_mask
from kvatlas.models.attention import AttentionCall


def votes_of(
    received: Received, call: AttentionCall, positions: Tensor, q: Tensor, parts: Seq[Part], masses: list[Tensor]
) -> list[Tensor]:
    """Return what a step pays to the slots of each part [R, H, S], put together as asked for.

    Args:
        received: how.
        call: of the layer.
        positions: [R], of the queries.
        q: [R, Hq, Dk].
        parts: what was attended to.
        masses: what each slot got from all query heads of its KV head, [R, H, S] per part.
    """
    masses = _of_heads(received, call, positions, q, parts, masses)
    return _below_mean(masses, parts, positions, call.window) if received.over == "below_mean" else masses


def _of_heads(
    received: Received, call: AttentionCall, positions: Tensor, q: Tensor, parts: Seq[Part], masses: list[Tensor]
) -> list[Tensor]:
    heads = parts[0].table.shape[1]
    size = q.shape[1] // heads
    if received.heads == "sum" or size == 1:
        return masses
    if received.heads == "mean":
        return [mass / size for mass in masses]
    # Each query head has lanes of its own then; reading them once more is the price.
    apart = [
        replace(part, table=part.table.repeat_interleave(size, 1), length=part.length.repeat_interleave(size, 1))
        for part in parts
    ]
    _, found = decode_attention(
        q, apart, scale=call.scale, softcap=call.softcap, sinks=call.sinks, window=call.window,
        query_position=positions, need_mass=True,
    )  # fmt: skip
    assert found is not None
    return [mass.view(len(q), heads, size, -1).amax(dim=2) for mass in found]


def _below_mean(masses: list[Tensor], parts: Seq[Part], positions: Tensor, window: int | None) -> list[Tensor]:
    """Return 1 for each slot [R, H, S] of each part that gets less than if all that is seen got as much; else 0."""
    hidden = [slot_mask(part, window=window, query_position=positions) for part in parts]
    seen = [
        torch.ones_like(mass, dtype=torch.bool) if mask is None else (mask == 0).expand_as(mass)
        for mass, mask in zip(masses, hidden, strict=True)
    ]
    number = torch.stack([each.sum(dim=-1) for each in seen]).sum(dim=0)[..., None]
    return [((mass * number < BELOW_MEAN) & each).float() for mass, each in zip(masses, seen, strict=True)]
