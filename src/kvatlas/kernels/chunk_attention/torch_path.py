"""Chunk attention over tiles of keys, merged by log-sum-exp.

Where torch has a flash kernel that returns the log-sum-exp for these arguments, each tile runs on it; if
not, two batched products around an exponential, few queries at a time. Sums are float32 or wider.
Shapes: T queries, Hq query heads, H KV heads, G query heads per KV head, S slots of a tile, D key width,
E value width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from kvatlas.kernels.pool import Part
from kvatlas.kernels.tiles import Queries, Step, Stream, log2_scores
from kvatlas.kernels.visibility import Sight

LN_2 = math.log(2)

FEW_QUERIES = 16
"""Up to this many queries, the heads of a group are one longer run of queries for the flash kernel."""


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    past: Sequence[Part],
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    reach: tuple[int, int] | None,
    tile_slots: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.chunk_attention.chunk_attention`."""
    T, Hq, D = q.shape
    H, E = k.shape[1], v.shape[-1]
    G = Hq // H
    q_HGTD = q.view(T, H, G, D).permute(1, 2, 0, 3)
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_HGTE = torch.zeros(H, G, T, E, dtype=dtype, device=q.device)
    lse_HGT = torch.full((H, G, T), -torch.inf, dtype=dtype, device=q.device)
    queries, sight = Queries.at(positions), Sight(window, reach)
    flash = has_flash(q, v, softcap)
    stream = Stream(
        queries=queries,
        sight=sight,
        tile_slots=tile_slots,
        dtype=q.dtype,
        numbers_per_pair=0 if flash else G,
    )
    steps: Iterator[Step] = chain.from_iterable(stream.past(part, values=True) for part in past)
    if flash and queries.are_causal(sight):
        own = flash_attend(q_HGTD, k.transpose(0, 1).to(q.dtype), v.transpose(0, 1).to(q.dtype), None, scale, True)
        _merge(out_HGTE, lse_HGT, *own)
    else:
        steps = chain(steps, stream.own(k, v))
    for step in steps:
        part_HGTD = q_HGTD[step.heads, :, step.rows]
        assert step.v is not None
        if flash:
            new = flash_attend(part_HGTD, step.k, step.v, step.mask, scale, False)
        else:
            new = plain_attend(part_HGTD, step.k, step.v, step.mask, scale, softcap)
        _merge(out_HGTE[step.heads, :, step.rows], lse_HGT[step.heads, :, step.rows], *new)
    if sinks is not None:
        logit_HG1 = sinks.to(dtype).view(H, G, 1)
        _merge(out_HGTE, lse_HGT, out_HGTE.new_zeros(()).expand_as(out_HGTE), logit_HG1.expand_as(lse_HGT))
    return out_HGTE.permute(2, 0, 1, 3).reshape(T, Hq, E).to(q.dtype), lse_HGT.reshape(Hq, T).float()


def has_flash(q: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Whether torch has a kernel for these arguments that also returns the log-sum-exp."""
    narrow = q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return q.device.type == "cpu" and narrow and softcap is None and q.shape[-1] == v.shape[-1]


def flash_attend(
    q_HGTD: Tensor, k_HSD: Tensor, v_HSD: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return one step by torch's CPU flash kernel: output [H, G, T, D] and log-sum-exp [H, G, T].

    Args:
        q_HGTD: queries.
        k_HSD: keys.
        v_HSD: values.
        mask: additive [H or 1, T, S], or None.
        scale: factor of the dot product.
        is_causal: query i sees keys 0 to i.
    """
    H, G, T, _ = q_HGTD.shape
    S = k_HSD.shape[1]
    # The kernel takes elements of a row to be neighbours without asking.
    q_HGTD, k_HSD, v_HSD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_HGTD, k_HSD, v_HSD))
    mask_HGTS = None if mask is None else mask.unsqueeze(1).expand(H, G, T, S)
    fold = G > 1 and T <= FEW_QUERIES and not is_causal
    if fold:
        q_HGTD = q_HGTD.reshape(H, 1, G * T, -1)
        mask_HGTS = None if mask_HGTS is None else mask_HGTS.reshape(H, 1, G * T, S)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_HGTD,
        k_HSD.unsqueeze(1).expand(-1, q_HGTD.shape[1], -1, -1),
        v_HSD.unsqueeze(1).expand(-1, q_HGTD.shape[1], -1, -1),
        0.0,
        is_causal,
        attn_mask=mask_HGTS,
        scale=scale,
    )
    out, lse = out.reshape(H, G, T, -1), lse.reshape(H, G, T)
    if mask is not None:
        # The kernel returns a log-sum-exp of 0 for a query that sees nothing.
        blind_HT = mask.amax(dim=-1) < 0
        lse = lse.masked_fill(blind_HT.unsqueeze(1), -torch.inf)
    return out, lse


def plain_attend(
    q_HGTD: Tensor, k_HSD: Tensor, v_HSE: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return one step by torch operations: output [H, G, T, E] and log-sum-exp [H, G, T].

    Args:
        q_HGTD: queries.
        k_HSD: keys.
        v_HSE: values.
        mask: additive [H or 1, T, S], or None.
        scale: factor of the dot product.
        softcap: cap of the scores, or None.
    """
    H, G, T, _ = q_HGTD.shape
    dtype = torch.promote_types(q_HGTD.dtype, torch.float32)
    weights = log2_scores(q_HGTD.to(dtype), k_HSD.to(dtype), mask, scale=scale, softcap=softcap)
    # A query that sees nothing has a highest score of -inf; any finite number turns its weights into zeros.
    highest = weights.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
    weights.sub_(highest).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.bmm(weights.view(H, G * T, -1), v_HSE.to(dtype)).view(H, G, T, -1)
    out /= total.clamp(min=torch.finfo(dtype).tiny)
    return out, (highest + total.log2()).squeeze(-1) * LN_2


def _merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Fold the attention over further keys into ``out`` [..., T, E] and ``lse`` [..., T], in place."""
    both = torch.logaddexp(lse, new_lse)
    # Where neither side has seen a key, the share is exp(-inf - finite) = 0 and the zeros stay.
    share = torch.exp(new_lse - both.clamp(min=torch.finfo(both.dtype).min))
    out.lerp_(new_out.to(out.dtype), share.unsqueeze(-1))
    lse.copy_(both)
