"""Triton kernel of decode attention over float and int8 blocks: one program per lane and run of slots.

The query heads of a KV head are the rows of one product, padded to what a tensor core takes; slots are its columns.
A program keeps a running softmax over its run and writes its output and log-sum-exp; a second kernel merges runs.
Scores and log-sum-exps are in units of log 2. Idea of splitting along the context: Flash-Decoding (Dao et al., 2023).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# Triton reads these functions as its own language; their arguments are pointers, scalars and constants.

from __future__ import annotations

import triton
import triton.language as tl

from kvatlas.kernels.triton_tiles import LOG2_E, capped, product, unit_rows


@triton.jit
def attend_float(
    q,
    keys,
    values,
    params,
    sidecars,
    table,
    length,
    slots,
    query_position,
    out,
    lse,
    scores,
    scale,
    softcap,
    window,
    dense_start,
    run,
    first_run,
    num_runs,
    table_stride_r,
    table_stride_h,
    slots_stride,
    scores_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    GRANULE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    KP_OFFSET: tl.constexpr,
    VP_OFFSET: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    INT8: tl.constexpr,
    HIDE_EMPTY: tl.constexpr,
    WINDOW: tl.constexpr,
    DENSE: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCORES: tl.constexpr,
    DOT: tl.constexpr,
    SHIFT: tl.constexpr,
    M: tl.constexpr,
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend from the heads of one lane to slots [low, high) of it.

    Pointers: ``keys`` and ``values`` to the arena as elements, ``params`` as float16, ``sidecars`` as int32. A block
    id counts granules of GRANULE elements (32 of float16, 16 of int32); the *_OFFSET are where a block's parts start,
    in the elements of their pointer. ``out`` [R * Hq, num_runs, DV] and ``lse`` [R * Hq, num_runs] get run
    ``first_run`` + program. ``scores`` [R * Hq, scores_stride], log 2, -inf where hidden, if SCORES.
    """
    lane = tl.program_id(0)
    r, h = lane // H, lane % H
    low = tl.program_id(1) * run
    high = tl.minimum(low + run, tl.load(length + lane).to(tl.int32))
    oldest = 0
    if WINDOW:
        oldest = tl.load(query_position + r).to(tl.int32) - window + 1
        if DENSE and not SCORES and not SLOTS:  # what is older need not be looked at
            low = tl.maximum(low, tl.maximum(oldest - dense_start, 0) // BLOCK * BLOCK)
    g = tl.arange(0, M)
    dk = tl.arange(0, DKP)
    dv = tl.arange(0, DVP)
    head = lane * G + g
    q_MD = tl.load(q + head[:, None] * DK + dk[None, :], mask=(g < G)[:, None] & (dk < DK)[None, :], other=0.0)
    q_MD, factor = unit_rows(q_MD.to(tl.float32), DOT)
    factor = factor * scale if SOFTCAP else factor * (scale * LOG2_E)
    table += r * table_stride_r + h * table_stride_h
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK)
        seen = n < high
        slot = n
        if SLOTS:
            slot = tl.load(slots + lane * slots_stride + n, mask=seen, other=0)
        block = tl.load(table + slot // S, mask=seen, other=0).to(tl.int64)
        inside = slot % S
        if DENSE:
            if WINDOW:
                seen = seen & (dense_start + slot >= oldest)
        elif HIDE_EMPTY or WINDOW:
            position = tl.load(sidecars + block * 16 + POSITION_OFFSET + inside, mask=seen, other=-1)
            if HIDE_EMPTY:
                seen = seen & (position >= 0)
            if WINDOW:
                seen = seen & (position >= oldest)
        place = block * GRANULE
        k_DN = tl.load(
            keys + (place + inside * DK)[None, :] + dk[:, None],
            mask=seen[None, :] & (dk < DK)[:, None],
            other=0,
        )
        s = product(q_MD, k_DN.to(DOT), tl.zeros([M, BLOCK], tl.float32)) * factor[:, None]
        if INT8:
            s *= tl.load(params + block * 32 + KP_OFFSET + inside, mask=seen, other=0).to(tl.float32)[None, :]
        if SOFTCAP:
            s = capped(s, softcap)
        s = tl.where(seen[None, :], s, float("-inf"))
        if SCORES:
            where = scores + head.to(tl.int64)[:, None] * scores_stride + n[None, :]
            tl.store(where, s, mask=(g < G)[:, None] & (n < high)[None, :])
        higher = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - anchor)
        p = tl.exp2(s - anchor[:, None] + SHIFT)
        top = higher
        total = total * shrink + tl.sum(p, 1)
        v_ND = tl.load(
            values + (place + V_OFFSET + inside * DV)[:, None] + dv[None, :],
            mask=seen[:, None] & (dv < DV)[None, :],
            other=0,
        ).to(DOT)
        if INT8:
            v_ND *= tl.load(params + block * 32 + VP_OFFSET + inside, mask=seen, other=0).to(DOT)[:, None]
        acc = product(p.to(DOT), v_ND, acc * shrink[:, None])
    index = head.to(tl.int64) * num_runs + first_run + tl.program_id(1)
    tl.store(lse + index, tl.where(total > 0, top + tl.log2(total) - SHIFT, float("-inf")), mask=g < G)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + index[:, None] * DV + dv[None, :], acc, mask=(g < G)[:, None] & (dv < DV)[None, :])
