"""Triton kernel of column sums: a program holds some keys and walks over all queries of the chunk.

Shapes: N keys of a program, M rows (a query and a head of the group), D key width.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# Triton reads these functions as its own language; their arguments are pointers, scalars and constants.

from __future__ import annotations

import triton
import triton.language as tl

from kvatlas.kernels.triton_tiles import LOG2_E, capped, key_tile, product

_CHANGING = ["window", "sink_tokens", "recent", "dense_start", "num_queries", "num_slots", "table_stride"]
"""Numbers that change while a request runs: a kernel compiled anew for round ones would stall it."""


@triton.jit(do_not_specialize=_CHANGING)
def sum_columns(
    q,
    lse,
    query_position,
    elements,
    params,
    sidecars,
    table,
    length,
    sums,
    scale,
    softcap,
    window,
    sink_tokens,
    recent,
    dense_start,
    num_queries,
    num_slots,
    table_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    BITS: tl.constexpr,
    S: tl.constexpr,
    GRANULE: tl.constexpr,
    KP_OFFSET: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    OWN: tl.constexpr,
    DENSE: tl.constexpr,
    WINDOW: tl.constexpr,
    REACH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    DKP: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
):
    """Write ``sums`` [H, num_slots]: what each key receives from ``num_queries`` queries of its group's G heads.

    ``q`` [T, H * G, DK], ``lse`` [H * G, T] natural log. If OWN, ``elements`` are the chunk's keys [T, H, DK]; else
    the arena, as in ``key_tile``.
    """
    h = tl.program_id(0)
    n = tl.program_id(1) * N + tl.arange(0, N)
    d = tl.arange(0, DKP)
    if OWN:
        used = n < num_queries
        position = tl.load(query_position + n, mask=used, other=0).to(tl.int32)
        k_ND = tl.load(
            elements + (n * (H * DK) + h * DK)[:, None] + d[None, :],
            mask=used[:, None] & (d < DK)[None, :],
            other=0.0,
        )
    else:
        used = n < tl.load(length + h).to(tl.int32)
        block = tl.load(table + h * table_stride + n // S, mask=used, other=0).to(tl.int64)
        if DENSE:
            position = dense_start + n
        else:
            position = tl.load(sidecars + block * 16 + POSITION_OFFSET + n % S, mask=used, other=-1)
            used = used & (position >= 0)
        mask = used[:, None] & (d < DK)[None, :]
        k_ND = key_tile(elements, params, block, n % S, d, mask, DK, BITS, GRANULE, KP_OFFSET)
    k_ND = k_ND.to(DOT)
    first = tl.min(tl.where(used, position, 2147483647))
    total = tl.zeros([N], tl.float32)
    for start in range(0, num_queries * G, M):
        row = start + tl.arange(0, M)
        real = row < num_queries * G
        t = row // G
        head = h * G + row % G
        now = tl.load(query_position + t, mask=real, other=-1).to(tl.int32)
        if tl.max(now) >= first:
            q_DM = tl.load(
                q + (t * (H * G * DK) + head * DK)[None, :] + d[:, None],
                mask=real[None, :] & (d < DK)[:, None],
                other=0.0,
            )
            s = product(k_ND, q_DM.to(DOT), tl.zeros([N, M], tl.float32)) * scale
            s = capped(s, softcap) if SOFTCAP else s * LOG2_E
            norm = tl.load(lse + head * num_queries + t, mask=real, other=float("inf"))
            norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2_E)  # that query saw nothing
            seen = used[:, None] & (position[:, None] <= now[None, :])
            if WINDOW:
                seen = seen & (position[:, None] > now[None, :] - window)
            if REACH:
                near = (position[:, None] < sink_tokens) | (position[:, None] > now[None, :] - recent)
                seen = seen & near
            total += tl.sum(tl.where(seen, tl.exp2(s - norm[None, :]), 0.0), 1)
    tl.store(sums + h.to(tl.int64) * num_slots + n, total, mask=n < num_slots)
