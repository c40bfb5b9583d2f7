"""Triton kernel of decode attention over float and int8 blocks: one program per lane and run of slots.

The query heads of a KV head are the rows of one product, padded to what a tensor core takes; slots are its columns.
A program keeps a running softmax over its run and writes its output and log-sum-exp; a second kernel merges runs.
Scores and log-sum-exps are in units of log 2. Idea of splitting along the context: Flash-Decoding (Dao et al., 2023).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# Triton reads these functions as its own language; their arguments are pointers, scalars and constants.

from __future__ import annotations

import triton
import triton.language as tl

from kvatlas.kernels.triton_tiles import LOG2_E, capped, product, query_pairs, unit_rows

_CHANGING = [
    "window",
    "dense_start",
    "run",
    "first_run",
    "num_runs",
    "table_stride_r",
    "table_stride_h",
    "scores_stride",
    "slots_stride",
]
"""Numbers that change while a request runs: a kernel compiled anew for round ones would stall it."""


@triton.jit
def _bytes(words, j: tl.constexpr):
    """Return the signed bytes j and j + 2 of each word [n, w] as float16 [n, 2w], word by word.

    A byte that is put under the exponent of 1024 is 1024 more than it was; both halves of a word become one at once.
    """
    both = ((words >> (8 * j)) & 0x00FF00FF) ^ 0x64806480
    low = both.to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    return tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))


@triton.jit(do_not_specialize=_CHANGING)
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
    WORDS: tl.constexpr,
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
    ``first_run`` + program. ``scores`` [R * Hq, scores_stride], log 2, -inf where hidden, if SCORES. If WORDS, keys and
    values are int8 and are read four at a time, by ``sidecars``.
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
    q0 = query_pairs(q, head, factor, 0, G, DK, DKP // 4, DOT)
    q1 = query_pairs(q, head, factor, 1, G, DK, DKP // 4, DOT)
    ck = tl.arange(0, DKP // 4)
    cv = tl.arange(0, DVP // 4)
    factor = factor * scale if SOFTCAP else factor * (scale * LOG2_E)
    table += r * table_stride_r + h * table_stride_h
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    acc0 = tl.zeros([M, DVP // 2], tl.float32)  # channels 0, 2, 4 .. of WORDS
    acc1 = tl.zeros([M, DVP // 2], tl.float32)
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
        s = tl.zeros([M, BLOCK], tl.float32)
        if WORDS:
            words_NC = tl.load(
                sidecars + (block * 16 + inside * (DK // 4))[:, None] + ck[None, :],
                mask=seen[:, None] & (4 * ck < DK)[None, :],
                other=0,
            )
            s = product(q0, tl.trans(_bytes(words_NC, 0)), s)
            s = product(q1, tl.trans(_bytes(words_NC, 1)), s)
        else:
            k_DN = tl.load(
                keys + (place + inside * DK)[None, :] + dk[:, None],
                mask=seen[None, :] & (dk < DK)[:, None],
                other=0,
            )
            s = product(q_MD, k_DN.to(DOT), s)
        s *= factor[:, None]
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
        p = p.to(DOT)
        if INT8:
            p *= tl.load(params + block * 32 + VP_OFFSET + inside, mask=seen, other=0).to(DOT)[None, :]
        if WORDS:
            words_NC = tl.load(
                sidecars + (block * 16 + V_OFFSET // 4 + inside * (DV // 4))[:, None] + cv[None, :],
                mask=seen[:, None] & (4 * cv < DV)[None, :],
                other=0,
            )
            acc0 = product(p, _bytes(words_NC, 0), acc0 * shrink[:, None])
            acc1 = product(p, _bytes(words_NC, 1), acc1 * shrink[:, None])
        else:
            v_ND = tl.load(
                values + (place + V_OFFSET + inside * DV)[:, None] + dv[None, :],
                mask=seen[:, None] & (dv < DV)[None, :],
                other=0,
            )
            acc = product(p, v_ND.to(DOT), acc * shrink[:, None])
    index = head.to(tl.int64) * num_runs + first_run + tl.program_id(1)
    tl.store(lse + index, tl.where(total > 0, top + tl.log2(total) - SHIFT, float("-inf")), mask=g < G)
    share = tl.where(total > 0, 1.0 / total, 1.0)[:, None]
    out += index[:, None] * DV
    if WORDS:
        pair = 2 * tl.arange(0, DVP // 2)
        mask = (g < G)[:, None] & (pair < DV)[None, :]
        tl.store(out + pair[None, :], acc0 * share, mask=mask)
        tl.store(out + pair[None, :] + 1, acc1 * share, mask=mask)
    else:
        tl.store(out + dv[None, :], acc * share, mask=(g < G)[:, None] & (dv < DV)[None, :])
