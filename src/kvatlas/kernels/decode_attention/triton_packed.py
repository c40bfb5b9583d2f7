"""Triton kernel of decode attention over int4 and int2 blocks: codes are unpacked in registers, and never scaled.

A group's scale belongs to a block's key channel, or to a token's 32 value channels. So each block, and each 32 value
channels, has its own left operand (queries times key scales, weights times value scales), and all of them are one
batched product with the bare codes, which float16 holds exactly. Unpacking two codes costs a shift and a bit operation,
as each is left with an exponent on top; that adds the same to all, which the minima take back.
Shapes: B blocks of a step, M rows (query heads of the group, padded), C quads of key channels, W words of a run,
P codes of a byte, R quads of tokens, G groups of 32 value channels.

A word of 32 bits holds element j of its quads in byte j. The halves of a word are two operands of one product, so the
order of channels is 0, 2, 4 .. and then 1, 3, 5 ..; scales and minima lie so in words, too, and so do the weights of
the tokens. Scores come in the order of the words, and are put into the order of the tokens before the softmax.
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
]
"""Numbers that change while a request runs: a kernel compiled anew for round ones would stall it."""


@triton.jit
def _codes(words, shift: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """Return 2 ** BITS + code, of the codes at bits ``shift`` and ``shift + 16`` of each word [b, n, w], as [b, 2n, w].

    A code that is put into the highest bits of a fraction, under the exponent of 2 ** BITS, is such a number; both
    halves of a word become one at once.
    """
    if DOT == tl.float16:  # noqa: SIM300  (it is an argument)
        UP: tl.constexpr = 10 - BITS - shift
        moved = words << UP if UP >= 0 else words >> -UP
        LEVELS: tl.constexpr = ((1 << BITS) - 1) << (10 - BITS)
        EXPONENT: tl.constexpr = (15 + BITS) << 10
        both = (moved & (LEVELS * 0x10001)) | (EXPONENT * 0x10001)
        low = both.to(tl.int16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        low = ((words >> shift) & ((1 << BITS) - 1)).to(tl.float32) + 2.0**BITS
        high = ((words >> (shift + 16)) & ((1 << BITS) - 1)).to(tl.float32) + 2.0**BITS
    pairs = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(pairs, (words.shape[0], 2 * words.shape[1], words.shape[2]))


@triton.jit
def _half(words, j: tl.constexpr, DOT: tl.constexpr):
    """Return the lower float16 of each word, or the higher."""
    return (words >> (16 * j)).to(tl.int16).to(tl.float16, bitcast=True).to(DOT)


@triton.jit
def _lowered(least, scale, BITS: tl.constexpr):
    """Return the minima that go with :func:`_codes`, rounded once."""
    return tl.fma(scale, tl.full(scale.shape, -(2.0**BITS), scale.dtype), least)


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


@triton.jit(do_not_specialize=_CHANGING)
def attend_packed(
    q,
    words,
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

    ``words`` and ``sidecars`` point to the arena as int32, 16 to a granule, and all offsets count them. ``run`` is a
    multiple of 32 * B.
    """
    W: tl.constexpr = 4 * BITS
    P: tl.constexpr = 8 // BITS
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
    q0 = query_pairs(q, head, factor, 0, G, DK, C, DOT)
    q1 = query_pairs(q, head, factor, 1, G, DK, C, DOT)
    factor = factor * scale if SOFTCAP else factor * (scale * LOG2_E)
    table += r * table_stride_r + h * table_stride_h

    b = tl.arange(0, B)
    c = tl.arange(0, C)
    w = tl.arange(0, W)
    gv = tl.arange(0, GROUPS)
    t = tl.arange(0, 32 * B)
    c2 = tl.arange(0, 2 * C)
    row = tl.arange(0, 8 * B)  # quads of tokens
    pair = tl.arange(0, 16 * B)  # tokens 4r + j and 4r + j + 2 of a quad
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    base = tl.zeros([M, GROUPS], tl.float32)  # weights times minima
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
        there = (start + 32 * b < high)[:, None] & (2 * c2 < DK)[None, :]
        param = words + KP_OFFSET + (block_B * 16)[:, None] + c2[None, :]
        scales_BC = tl.load(param, mask=there, other=0)
        leasts_BC = tl.load(param + DK // 2, mask=there, other=0)
        for j in tl.static_range(2):
            q_MC = q0 if j == 0 else q1
            scale_BC = _half(scales_BC, j, DOT)
            left = q_MC[None, :, :] * scale_BC[:, None, :]
            s0 = product(left, _codes(words_BCW, 8 * j, BITS, DOT), s0)
            s1 = product(left, _codes(words_BCW, 8 * j + BITS, BITS, DOT), s1)
            if P == 4:
                s2 = product(left, _codes(words_BCW, 8 * j + 2 * BITS, BITS, DOT), s2)
                s3 = product(left, _codes(words_BCW, 8 * j + 3 * BITS, BITS, DOT), s3)
            least_BC = _lowered(_half(leasts_BC, j, DOT), scale_BC, BITS)
            floor_MB = product(q_MC, tl.trans(least_BC), floor_MB)
        if P == 2:  # noqa: SIM108  (both arms of an expression would be compiled)
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
        p = p.to(DOT)
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
        block_P = tl.load(table + column + pair // 16, mask=start + 2 * pair < high, other=0).to(tl.int64)
        there = (start + 2 * pair < high)[None, :] & (32 * gv < DV)[:, None]
        param = words + VP_OFFSET + (block_P * 16 + pair % 16)[None, :] + (gv * 16)[:, None]
        scales_GP = tl.load(param, mask=there, other=0)
        leasts_GP = tl.load(param + (DV + 31) // 32 * 16, mask=there, other=0)
        base *= shrink[:, None]
        even, odd = tl.split(tl.reshape(p, (M, 8 * B, 2, 2)))
        for j in tl.static_range(2):
            # A token that no query sees may have any scale, not-a-numbers included.
            known = start + 2 * pair + j < high
            if HIDE_EMPTY and not DENSE:
                place = sidecars + block_P * 16 + POSITION_OFFSET + 2 * (pair % 16) + j
                known = known & (tl.load(place, mask=known, other=-1) >= 0)
            scale_GP = tl.where(known[None, :], _half(scales_GP, j, DOT), 0.0)
            least_GP = tl.where(known[None, :], _half(leasts_GP, j, DOT), 0.0)
            weights = tl.reshape(even if j == 0 else odd, (M, 16 * B))
            left = weights[None, :, :] * scale_GP[:, None, :]
            acc0 = product(left, _codes(words_GRW, 8 * j, BITS, DOT), acc0)
            acc1 = product(left, _codes(words_GRW, 8 * j + BITS, BITS, DOT), acc1)
            if P == 4:
                acc2 = product(left, _codes(words_GRW, 8 * j + 2 * BITS, BITS, DOT), acc2)
                acc3 = product(left, _codes(words_GRW, 8 * j + 3 * BITS, BITS, DOT), acc3)
            base = product(weights, tl.trans(_lowered(least_GP, scale_GP, BITS)), base)

    index = head.to(tl.int64) * num_runs + first_run + tl.program_id(1)
    tl.store(lse + index, tl.where(total > 0, top + tl.log2(total) - SHIFT, float("-inf")), mask=g < G)
    share = tl.where(total > 0, 1.0 / total, 1.0)
    base_GM = share[None, :] * tl.trans(base)
    for k in tl.static_range(P):
        channel = (32 * gv)[:, None, None] + k * W + w[None, None, :]
        whole = _part(k, acc0, acc1, acc2, acc3) * share[None, :, None] + base_GM[:, :, None]
        tl.store(out + index[None, :, None] * DV + channel, whole, mask=(g < G)[None, :, None] & (channel < DV))
