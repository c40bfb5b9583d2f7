"""Triton kernels that encode and decode whole blocks, and that score their bounds.

Packed formats treat keys and values alike: a group of 32 numbers shares a scale, and 4 neighbouring groups make the
4 bytes of a word. Keys: a group is a channel's 32 tokens; values: a token's 32 channels.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# Triton reads these functions as its own language; their arguments are pointers, scalars and constants.

from __future__ import annotations

import triton
import triton.language as tl

from kvatlas.kernels.triton_tiles import key_tile, value_tile

_HALF_MAX = tl.constexpr(65504.0)
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _rounded(x):
    """Return x rounded half to even, for |x| below 2 ** 22: adding 1.5 * 2 ** 23 leaves no bits for fractions."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def encode_tokens(
    source,
    elements,
    params,
    ids,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    GRANULE: tl.constexpr,
    OFFSET: tl.constexpr,
    P_OFFSET: tl.constexpr,
    INT8: tl.constexpr,
    SP: tl.constexpr,
    DP: tl.constexpr,
):
    """Write ``source`` [n, S, WIDTH] into block ``ids[program]``: float formats and int8."""
    i = tl.program_id(0).to(tl.int64)
    block = tl.load(ids + i)
    t = tl.arange(0, SP)
    d = tl.arange(0, DP)
    mask = (t < S)[:, None] & (d < WIDTH)[None, :]
    at = (t * WIDTH)[:, None] + d[None, :]
    x = tl.load(source + i * (S * WIDTH) + at, mask=mask, other=0.0)
    if INT8:
        x = x.to(tl.float32)
        largest = tl.max(tl.abs(x), 1)
        scale = tl.minimum(tl.div_rn(largest, tl.full([SP], 127.0, tl.float32)), _HALF_MAX).to(tl.float16)
        tl.store(params + block * 32 + P_OFFSET + t, scale, mask=t < S)
        divisor = scale.to(tl.float32)
        divisor = tl.where(divisor > 0, divisor, float("inf"))
        code = tl.div_rn(x, tl.broadcast_to(divisor[:, None], (SP, DP)))
        x = _rounded(tl.minimum(tl.maximum(code, -127.0), 127.0))
    tl.store(elements + block * GRANULE + OFFSET + at, x.to(elements.dtype.element_ty), mask=mask)


@triton.jit
def encode_groups(
    source,
    words,
    params,
    ids,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    P_OFFSET: tl.constexpr,
    VALUES: tl.constexpr,
    Q: tl.constexpr,
):
    """Write ``source`` [n, 32, WIDTH] into block ``ids[program]``: packed formats.

    Keys: quads are of channels, Q of them, one program per block. Values: quads are of tokens, Q is 8, one program per
    block and group of 32 channels. ``words`` points to the arena as int32.
    """
    W: tl.constexpr = 4 * BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    LEASTS: tl.constexpr = (WIDTH + 31) // 32 * 32 if VALUES else WIDTH  # where minima lie behind their scales
    i = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    block = tl.load(ids + i)
    source += i * (32 * WIDTH)
    quad = tl.arange(0, Q)
    member = tl.arange(0, 32)
    w = tl.arange(0, W)
    word = tl.zeros([Q, W], tl.int32)
    for j in tl.static_range(4):
        one = 4 * quad + j  # whose scale it is: a channel or a token
        if VALUES:
            at = one[:, None] * WIDTH + (32 * group + member)[None, :]
            there = (32 * group + member < WIDTH)[None, :] & (one < 32)[:, None]
            param = params + block * 32 + P_OFFSET + group * 32 + one
        else:
            at = member[None, :] * WIDTH + one[:, None]
            there = (one < WIDTH)[:, None] & (member < 32)[None, :]
            param = params + block * 32 + P_OFFSET + one
        x = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
        lowest = tl.min(tl.where(there, x, float("inf")), 1)
        highest = tl.max(tl.where(there, x, float("-inf")), 1)
        # No number is left of a quad's channel that does not exist.
        exists = highest >= lowest
        lowest = tl.where(exists, lowest, 0.0)
        highest = tl.where(exists, highest, 0.0)
        least = (tl.minimum(tl.maximum(lowest, -_HALF_MAX), _HALF_MAX) + 0.0).to(tl.float16)
        step = tl.div_rn(highest - lowest, tl.full([Q], LEVELS, tl.float32))
        scale = tl.minimum(step, _HALF_MAX).to(tl.float16)
        tl.store(param, scale, mask=exists)
        tl.store(param + LEASTS, least, mask=exists)
        divisor = scale.to(tl.float32)
        divisor = tl.where(divisor > 0, divisor, float("inf"))
        for part in tl.static_range(8 // BITS):
            other = part * W + w
            if VALUES:
                at = one[:, None] * WIDTH + (32 * group + other)[None, :]
                there = (32 * group + other < WIDTH)[None, :] & (one < 32)[:, None]
            else:
                at = other[None, :] * WIDTH + one[:, None]
                there = (one < WIDTH)[:, None] & (other < 32)[None, :]
            x = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
            code = tl.div_rn(x - least.to(tl.float32)[:, None], tl.broadcast_to(divisor[:, None], (Q, W)))
            code = _rounded(tl.minimum(tl.maximum(code, 0.0), LEVELS)).to(tl.int32)
            word |= tl.where(there, code, 0) << (8 * j + BITS * part)
    target = words + block * 16 + OFFSET
    if VALUES:
        target += group * (8 * W)
        real = quad < 8
    else:
        real = quad * 4 < WIDTH
    tl.store(target + quad[:, None] * W + w[None, :], word, mask=tl.broadcast_to(real[:, None], (Q, W)))


@triton.jit
def decode_blocks(
    elements,
    params,
    ids,
    out,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    S: tl.constexpr,
    GRANULE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    P_OFFSET: tl.constexpr,
    VALUES: tl.constexpr,
    SP: tl.constexpr,
    DP: tl.constexpr,
):
    """Write ``out`` [n, S, WIDTH]: the keys, or the values, of block ``ids[program]`` in any format."""
    i = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, SP)
    d = tl.arange(0, DP)
    block = tl.load(ids + i).to(tl.int64) + tl.zeros([SP], tl.int64)
    mask = (t < S)[:, None] & (d < WIDTH)[None, :]
    if VALUES:
        x = value_tile(elements, params, block, t, d, mask, WIDTH, BITS, GRANULE, V_OFFSET, P_OFFSET)
    else:
        x = key_tile(elements, params, block, t, d, mask, WIDTH, BITS, GRANULE, P_OFFSET)
    tl.store(out + i * (S * WIDTH) + (t * WIDTH)[:, None] + d[None, :], x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["columns", "table_stride_r", "table_stride_h"])
def bound_scores(
    q,
    memory,
    table,
    length,
    out,
    columns,
    table_stride_r,
    table_stride_h,
    H: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    S: tl.constexpr,
    BOUND_OFFSET: tl.constexpr,
    DP: tl.constexpr,
    C: tl.constexpr,
):
    """Write ``out`` [R, H, columns]: for each block the largest that q . k can be; ``memory`` is float32."""
    lane = tl.program_id(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    d = tl.arange(0, DP)
    used = c * S < tl.load(length + lane).to(tl.int32)
    table += lane // H * table_stride_r + lane % H * table_stride_h
    block = tl.load(table + c, mask=used, other=0).to(tl.int64)
    mask = used[:, None] & (d < DK)[None, :]
    at = memory + BOUND_OFFSET + (block * 16)[:, None] + d[None, :]
    least = tl.load(at, mask=mask, other=0.0)
    greatest = tl.load(at + DK, mask=mask, other=0.0)
    empty = least > greatest  # a block without tokens
    used = used & (tl.max(empty.to(tl.int32), 1) == 0)
    least = tl.where(empty, 0.0, least)
    greatest = tl.where(empty, 0.0, greatest)
    best = tl.full([C], float("-inf"), tl.float32)
    for g in range(G):
        x = tl.load(q + (lane * G + g) * DK + d, mask=d < DK, other=0.0).to(tl.float32)[None, :]
        best = tl.maximum(best, tl.sum(tl.maximum(x * least, x * greatest), 1))
    tl.store(out + lane.to(tl.int64) * columns + c, tl.where(used, best, float("-inf")), mask=c < columns)


@triton.jit
def copy_words(source, source_ids, target, target_ids, WORDS: tl.constexpr, TILE: tl.constexpr):
    """Copy block ``source_ids[program]`` to block ``target_ids[program]``, WORDS int32 each, 16 to a granule.

    One of the two may lie in page-locked memory of the host: the processors then read or write over the bus.
    """
    i = tl.program_id(0)
    source += tl.load(source_ids + i) * 16
    target += tl.load(target_ids + i) * 16
    for start in range(0, WORDS, TILE):
        w = start + tl.arange(0, TILE)
        tl.store(target + w, tl.load(source + w, mask=w < WORDS), mask=w < WORDS)
