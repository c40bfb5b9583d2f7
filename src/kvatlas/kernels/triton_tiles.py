"""What several Triton kernels compute alike: scores' units, capped scores, and tiles of decoded blocks."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# Triton reads these functions as its own language; their arguments are pointers, scalars and constants.

from __future__ import annotations

import triton
import triton.language as tl

from kvatlas.kernels.triton_support import interpreted

LOG2_E = tl.constexpr(1.4426950408889634)

NO_BF16 = tl.constexpr(interpreted())
"""Triton's interpreter keeps bfloat16 as bits and would calculate with these; so there, rounded numbers go on wider."""


@triton.jit
def product(a, b, c):
    """Return a @ b + c in float32, as exact as the operands' type: float32 is split into three tf32 products."""
    if NO_BF16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="tf32x3")


@triton.jit
def capped(s, softcap):
    """Return softcap * tanh(s / softcap) in units of log 2."""
    return softcap * LOG2_E * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2_E / softcap))))


@triton.jit
def unit_rows(q_MD, DOT: tl.constexpr):
    """Return the rows in type DOT, and what each was divided by so that float16 holds it, however large it is."""
    factor = tl.full([q_MD.shape[0]], 1.0, tl.float32)
    if DOT == tl.float16:  # noqa: SIM300  (it is an argument)
        largest = tl.max(tl.abs(q_MD), 1)
        factor = tl.where(largest > 0, tl.exp2(tl.ceil(tl.log2(largest))), 1.0)
        q_MD = q_MD / factor[:, None]
    return q_MD.to(DOT), factor


@triton.jit
def query_pairs(
    q, head, factor, j: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr
):
    """Return the queries' channels 4c + j and 4c + j + 2, [M, 2C], c by c."""
    k = tl.arange(0, 2 * C)
    d = 2 * k + j
    g = tl.arange(0, head.shape[0])
    x = tl.load(q + head[:, None] * DK + d[None, :], mask=(g < G)[:, None] & (d < DK)[None, :], other=0.0)
    return (x.to(tl.float32) / factor[:, None]).to(DOT)


@triton.jit
def key_tile(
    elements,
    params,
    block_N,
    inside_N,
    d,
    mask_ND,
    DK: tl.constexpr,
    BITS: tl.constexpr,
    GRANULE: tl.constexpr,
    KP_OFFSET: tl.constexpr,
):
    """Return some tokens' keys in float32 [N, D], 0 where not ``mask_ND``, in any format.

    ``elements`` points to the arena as elements of the format, GRANULE to a block id; bytes if BITS is 4 or 2.
    """
    place = block_N * GRANULE
    if BITS < 8:
        W: tl.constexpr = 4 * BITS
        byte = (place + inside_N % W * 4)[:, None] + (d // 4 * (4 * W) + d % 4)[None, :]
        code = tl.load(elements + byte, mask=mask_ND, other=0).to(tl.int32)
        code = (code >> (inside_N // W * BITS)[:, None]) & ((1 << BITS) - 1)
        param = params + KP_OFFSET + (block_N * 32)[:, None] + d[None, :]
        scale = tl.load(param, mask=mask_ND, other=0.0).to(tl.float32)
        x = code.to(tl.float32) * scale + tl.load(param + DK, mask=mask_ND, other=0.0).to(tl.float32)
    else:
        x = tl.load(elements + (place + inside_N * DK)[:, None] + d[None, :], mask=mask_ND, other=0).to(tl.float32)
        if BITS == 8:
            seen = tl.max(mask_ND.to(tl.int32), 1) > 0
            x *= tl.load(params + KP_OFFSET + block_N * 32 + inside_N, mask=seen, other=0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def value_tile(
    elements,
    params,
    block_N,
    inside_N,
    d,
    mask_ND,
    DV: tl.constexpr,
    BITS: tl.constexpr,
    GRANULE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    VP_OFFSET: tl.constexpr,
):
    """Return some tokens' values in float32 [N, D], as :func:`key_tile` does the keys; V_OFFSET counts elements."""
    place = block_N * GRANULE + V_OFFSET
    if BITS < 8:
        W: tl.constexpr = 4 * BITS
        byte = (place + inside_N // 4 * (4 * W) + inside_N % 4)[:, None]
        byte += (d // 32 * (32 * W) + d % 32 % W * 4)[None, :]
        code = tl.load(elements + byte, mask=mask_ND, other=0).to(tl.int32)
        code = (code >> (d % 32 // W * BITS)[None, :]) & ((1 << BITS) - 1)
        param = params + VP_OFFSET + (block_N * 32 + inside_N)[:, None] + (d // 32 * 32)[None, :]
        scale = tl.load(param, mask=mask_ND, other=0.0).to(tl.float32)
        least = tl.load(param + (DV + 31) // 32 * 32, mask=mask_ND, other=0.0).to(tl.float32)
        x = code.to(tl.float32) * scale + least
    else:
        x = tl.load(elements + (place + inside_N * DV)[:, None] + d[None, :], mask=mask_ND, other=0).to(tl.float32)
        if BITS == 8:
            seen = tl.max(mask_ND.to(tl.int32), 1) > 0
            x *= tl.load(params + VP_OFFSET + block_N * 32 + inside_N, mask=seen, other=0.0).to(tl.float32)[:, None]
    return x
