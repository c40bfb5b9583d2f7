"""Chunk attention: the queries of one prompt chunk against the cached past and against the chunk itself.

Memory is linear in the chunk and does not grow with the past; the log-sum-exp that comes back lets a second
pass recompute any probability exactly (:mod:`kvatlas.kernels.column_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvatlas.kernels.chunk_attention import reference, torch_path
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.observed import observed
from kvatlas.kernels.pool import Part

__all__ = ["chunk_attention"]


@observed
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    past: Sequence[Part],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    reach: tuple[int, int] | None = None,
    tile_slots: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Return the attention output [T, Hq, Dv] in the type of ``q``, and the log-sum-exp [Hq, T] float32.

    Query head i reads KV head i // (Hq / H). A key is visible if it holds a token that is not later than the
    query, and window and reach both admit it. A query that sees nothing gives zeros and -inf.

    Args:
        q: [T, Hq, Dk], rotated.
        k: [T, H, Dk], the chunk's own keys; not read from the pool.
        v: [T, H, Dv], likewise.
        positions: [T] int, of the chunk's tokens.
        past: parts of the lanes with the cached tokens, in any format; tables [H, C], lengths [H]. Positions come from
            the pool, -1 for a slot without a token. A part's ``dense_start`` promises that all its lengths are equal
            and slot i holds position dense_start + i: slots that no query can see are then not even read.
        scale: factor of the dot product.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        sinks: [Hq] logits that take part in each head's denominator, unscaled; part of the log-sum-exp.
        window: visible are positions > query - window.
        reach: (sink_tokens, recent): visible are positions < sink_tokens or > query - recent.
        tile_slots: past slots to hold at a time, rounded up to whole blocks.
    """
    form = reference.chunk_attention if choose(q.device) == "reference" else torch_path.chunk_attention
    return form(
        q,
        k,
        v,
        positions,
        past,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        window=window,
        reach=reach,
        tile_slots=tile_slots,
    )
