"""Triton kernel of decode attention over int4 and int2 blocks: codes are unpacked in registers, and never scaled.

A group's scale belongs to a block's key channel, or to a token's 32 value channels. So each block, and each 32 value
channels, has its own left operand (queries times key scales, weights times value scales) and all of them are one
batched product with the bare codes, which small floats hold exactly. Unpacking then costs a shift, a mask and a
subtraction per element. Shapes: B blocks of a step, M rows (query heads of the group, padded), C quads of key
channels, W words of a run, P codes of a byte, g groups of 32 value channels.

A word of 32 bits holds element j of its quads in byte j. Scores come in the order of the words, and are put into the
order of the tokens before the softmax; weights are then parted by j, as the words of the values are.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# Triton reads these functions as its own language; their arguments are pointers, scalars and constants.

from __future__ import annotations

import triton
import triton.language as tl

from kvatlas.kernels.triton_tiles import LOG2_E, capped, product, unit_rows


@triton.jit
def _codes(words, shift: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """Return the codes at bit ``shift`` of each word as numbers: put under an exponent, which is then taken off."""
    code = (words >> shift) & ((1 << BITS) - 1)
    if DOT == tl.float16:
        number = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
    else:
        number = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return number


@triton.jit
def _part(j: tl.constexpr, x0, x1, x2, x3):
    if j == 0:
        x = x0
    elif j == 1:
        x = x1
    elif j == 2:
        x = x2
    else:
        x = x3
    return x


@triton.jit
def _query_quads(q, head, factor, j: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr):
    """Return the queries' channels 4 * c + j, [M, C]."""
    d = 4 * tl.arange(0, C) + j
    g = tl.arange(0, head.shape[0])
    x = tl.load(q + head[:, None] * DK + d[None, :], mask=(g < G)[:, None] & (d < DK)[None, :], other=0.0)
    return (x.to(tl.float32) / factor[:, None]).to(DOT)


@triton.jit
def attend_packed(
    q,
    words,
    params,
    sidecars,
    table,
    length,
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
    scores_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BITS: tl.constexpr,
    V_OFFSET: tl.constexpr,
    KP_OFFSET: tl.constexpr,
    VP_OFFSET: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    HIDE_EMPTY: tl.constexpr,
    WINDOW: tl.constexpr,
    DENSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCORES: tl.constexpr,
    DOT: tl.constexpr,
    SHIFT: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend from the heads of one lane to slots [low, high) of it; arguments as those of ``attend_float``.

    ``words`` points to the arena as int32, 16 to a granule; V_OFFSET counts them. ``run`` is a multiple of 32 * B.
    """
    W: tl.constexpr = 4 * BITS
    P: tl.constexpr = 8 // BITS
    UNSHIFT: tl.constexpr = 2.0**-SHIFT
    lane = tl.program_id(0)
    r, h = lane // H, lane % H
    low = tl.program_id(1) * run
    high = tl.minimum(low + run, tl.load(length + lane).to(tl.int32))
    oldest = 0
    if WINDOW:
        oldest = tl.load(query_position + r).to(tl.int32) - window + 1
        if DENSE and not SCORES:  # what is older need not be looked at
            low = tl.maximum(low, tl.maximum(oldest - dense_start, 0) // (32 * B) * (32 * B))
    g = tl.arange(0, M)
    head = lane * G + g
    dk = tl.arange(0, 4 * C)
    whole = tl.load(q + head[:, None] * DK + dk[None, :], mask=(g < G)[:, None] & (dk < DK)[None, :], other=0.0)
    _, factor = unit_rows(whole.to(tl.float32), DOT)
    q0 = _query_quads(q, head, factor, 0, G, DK, C, DOT)
    q1 = _query_quads(q, head, factor, 1, G, DK, C, DOT)
    q2 = _query_quads(q, head, factor, 2, G, DK, C, DOT)
    q3 = _query_quads(q, head, factor, 3, G, DK, C, DOT)
    factor = factor * scale if SOFTCAP else factor * (scale * LOG2_E)
    table += r * table_stride_r + h * table_stride_h

    b = tl.arange(0, B)
    c = tl.arange(0, C)
    w = tl.arange(0, W)
    gv = tl.arange(0, GROUPS)
    t = tl.arange(0, 32 * B)
    row = tl.arange(0, 8 * B)  # quads of tokens
    gm = tl.arange(0, 16)  # groups once more, as columns of a product
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    base = tl.zeros([M, 16], tl.float32)  # weights times minima
    acc0 = tl.zeros([GROUPS, M, W], tl.float32)
    acc1 = tl.zeros([GROUPS, M, W], tl.float32)
    acc2 = tl.zeros([GROUPS, M, W], tl.float32)
    acc3 = tl.zeros([GROUPS, M, W], tl.float32)
    for start in tl.range(low, high, 32 * B, num_stages=STAGES):
        column = start // 32
        # Keys.
        block_B = tl.load(table + column + b, mask=start + 32 * b < high, other=0).to(tl.int64)
        words_BCW = tl.load(
            words + (block_B * 16)[:, None, None] + c[None, :, None] * W + w[None, None, :],
            mask=(start + 32 * b < high)[:, None, None] & (4 * c < DK)[None, :, None],
            other=0,
        )
        s0 = tl.zeros([B, M, W], tl.float32)
        s1 = tl.zeros([B, M, W], tl.float32)
        s2 = tl.zeros([B, M, W], tl.float32)
        s3 = tl.zeros([B, M, W], tl.float32)
        floor_MB = tl.zeros([M, B], tl.float32)
        for j in tl.static_range(4):
            q_MC = _part(j, q0, q1, q2, q3)
            d = 4 * c + j
            there = (start + 32 * b < high)[:, None] & (d < DK)[None, :]
            param = params + (block_B * 32)[:, None] + KP_OFFSET + d[None, :]
            left = q_MC[None, :, :] * tl.load(param, mask=there, other=0.0).to(DOT)[:, None, :]
            s0 = product(left, _codes(words_BCW, 8 * j, BITS, DOT), s0)
            s1 = product(left, _codes(words_BCW, 8 * j + BITS, BITS, DOT), s1)
            if P == 4:
                s2 = product(left, _codes(words_BCW, 8 * j + 2 * BITS, BITS, DOT), s2)
                s3 = product(left, _codes(words_BCW, 8 * j + 3 * BITS, BITS, DOT), s3)
            least_BC = tl.load(param + DK, mask=there, other=0.0).to(DOT)
            floor_MB = product(q_MC, tl.trans(least_BC), floor_MB)
        if P == 2:
            s_BMWP = tl.join(s0, s1)
        else:
            s_BMWP = tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (B, M, W, P))
        s = tl.reshape(tl.permute(s_BMWP, (1, 0, 3, 2)), (M, B, 32)) + floor_MB[:, :, None]
        s = tl.reshape(s, (M, 32 * B)) * factor[:, None]
        if SOFTCAP:
            s = capped(s, softcap)
        n = start + t
        seen = n < high
        if DENSE:
            if WINDOW:
                seen = seen & (dense_start + n >= oldest)
        elif HIDE_EMPTY or WINDOW:
            block_T = tl.load(table + n // 32, mask=seen, other=0).to(tl.int64)
            position = tl.load(sidecars + block_T * 16 + POSITION_OFFSET + n % 32, mask=seen, other=-1)
            if HIDE_EMPTY:
                seen = seen & (position >= 0)
            if WINDOW:
                seen = seen & (position >= oldest)
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
        # Values.
        used = start + 4 * row < high
        block_R = tl.load(table + column + row // 8, mask=used, other=0).to(tl.int64)
        words_GRW = tl.load(
            words
            + V_OFFSET
            + (block_R * 16 + row % 8 * W)[None, :, None]
            + gv[:, None, None] * (8 * W)
            + w[None, None, :],
            mask=used[None, :, None] & (32 * gv < DV)[:, None, None],
            other=0,
        )
        acc0 *= shrink[None, :, None]
        acc1 *= shrink[None, :, None]
        acc2 *= shrink[None, :, None]
        acc3 *= shrink[None, :, None]
        even, odd = tl.split(tl.reshape(p, (M, 8 * B, 2, 2)))
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        for j in tl.static_range(4):
            token = row % 8 * 4 + j
            known = start + 4 * row + j < high
            if HIDE_EMPTY and not DENSE:
                known = known & (tl.load(sidecars + block_R * 16 + POSITION_OFFSET + token, mask=known, other=-1) >= 0)
            scale_GR = tl.load(
                params + VP_OFFSET + (block_R * 32 + token)[None, :] + (gv * 32)[:, None],
                mask=known[None, :] & (32 * gv < DV)[:, None],
                other=0.0,
            ).to(tl.float32)
            # Without SHIFT, so that no scale that float16 holds overflows it.
            left = (_part(j, p0, p1, p2, p3)[None, :, :] * (scale_GR * UNSHIFT)[:, None, :]).to(DOT)
            acc0 = product(left, _codes(words_GRW, 8 * j, BITS, DOT), acc0)
            acc1 = product(left, _codes(words_GRW, 8 * j + BITS, BITS, DOT), acc1)
            if P == 4:
                acc2 = product(left, _codes(words_GRW, 8 * j + 2 * BITS, BITS, DOT), acc2)
                acc3 = product(left, _codes(words_GRW, 8 * j + 3 * BITS, BITS, DOT), acc3)
        block_T = tl.load(table + n // 32, mask=n < high, other=0).to(tl.int64)
        least = tl.load(
            params
            + (VP_OFFSET + (DV + 31) // 32 * 32)
            + (block_T * 32 + n % 32)[:, None]
            + (gm * 32)[None, :],
            mask=seen[:, None] & (32 * gm < DV)[None, :],
            other=0.0,
        )
        base = product(p.to(DOT), least.to(DOT), base * shrink[:, None])

    index = head.to(tl.int64) * num_runs + first_run + tl.program_id(1)
    tl.store(lse + index, tl.where(total > 0, top + tl.log2(total) - SHIFT, float("-inf")), mask=g < G)
    share = tl.where(total > 0, 1.0 / total, 1.0)
    base_GM = share[None, :] * tl.sum(tl.where((gv[:, None] == gm[None, :])[:, None, :], base[None, :, :], 0.0), 2)
    share = share / UNSHIFT
    for k in tl.static_range(P):
        channel = (32 * gv)[:, None, None] + k * W + w[None, None, :]
        whole = _part(k, acc0, acc1, acc2, acc3) * share[None, :, None] + base_GM[:, :, None]
        tl.store(
            out + index[None, :, None] * DV + channel, whole, mask=(g < G)[None, :, None] & (channel < DV)
        )
