"""Triton kernels that close decode attention: merge the runs of a head, and turn scores into probability mass."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# Triton reads these functions as its own language; their arguments are pointers, scalars and constants.

from __future__ import annotations

import triton
import triton.language as tl

from kvatlas.kernels.triton_tiles import LOG2_E


@triton.jit(do_not_specialize=["num_runs"])
def merge_runs(
    partial,
    lse,
    sinks,
    out,
    merged_lse,
    num_runs,
    HQ: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SINKS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Merge ``partial`` [R * Hq, num_runs, DV], ``lse`` [R * Hq, num_runs] of one head into ``out``, ``merged_lse``."""
    head = tl.program_id(0)
    dv = tl.arange(0, DVP)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if SINKS:  # one more slot, whose value is zero
        top = tl.zeros([1], tl.float32) + tl.load(sinks + head % HQ).to(tl.float32) * LOG2_E
        total += 1.0
    acc = tl.zeros([DVP], tl.float32)
    first = head.to(tl.int64) * num_runs
    for start in range(0, num_runs, RUNS):
        i = start + tl.arange(0, RUNS)
        weight = tl.load(lse + first + i, mask=i < num_runs, other=float("-inf"))
        part = tl.load(
            partial + (first + i)[:, None] * DV + dv[None, :],
            mask=(weight > float("-inf"))[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        higher = tl.maximum(top, tl.max(weight, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - anchor)
        p = tl.exp2(weight - anchor)
        top = higher
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * part, 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + head.to(tl.int64) * DV + dv, acc.to(out.dtype.element_ty), mask=dv < DV)
    tl.store(merged_lse + head + tl.arange(0, 1), tl.where(total > 0, top + tl.log2(total), float("-inf")))


@triton.jit(do_not_specialize=["num_slots", "scores_stride"])
def sum_mass(scores, merged_lse, length, mass, num_slots, scores_stride, G: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``mass`` [lanes, num_slots]: each slot's probability, summed over the G query heads of its lane."""
    lane = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = n < tl.load(length + lane).to(tl.int32)
    received = tl.zeros([BLOCK], tl.float32)
    for g in range(G):
        head = (lane * G + g).to(tl.int64)
        s = tl.load(scores + head * scores_stride + n, mask=used, other=float("-inf"))
        received += tl.where(s > float("-inf"), tl.exp2(s - tl.load(merged_lse + head)), 0.0)
    tl.store(mass + lane.to(tl.int64) * num_slots + n, received, mask=n < num_slots)
