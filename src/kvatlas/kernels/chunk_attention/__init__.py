"""Chunk attention: the queries of prompt chunks against the cached past of their sequence and against the chunk itself.

Memory is linear in the chunks and does not grow with the past; the log-sum-exp that comes back lets a second
pass recompute any probability exactly (:mod:`kvatlas.kernels.column_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvatlas.kernels.chunk_attention import native, reference, torch_path
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.observed import observed
from kvatlas.kernels.pool import Part

__all__ = ["ChunkRows", "chunk_attention"]


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """The chunk of one sequence in a packed batch.

    Args:
        start: its first row.
        count: its rows, n.
        positions: [n] int, of its tokens; int32 costs nothing.
        past: parts of the lanes with the cached tokens, in any format; tables [H, C], lengths [H]. Positions come from
            the pool, -1 for a slot without a token. A part's ``dense_start`` promises that all its lengths are equal
            and slot i holds position dense_start + i: slots that no query can see are then not even read.
        reach: (sink_tokens, recent): visible are positions < sink_tokens or > query - recent.
    """

    start: int
    count: int
    positions: Tensor
    past: Sequence[Part]
    reach: tuple[int, int] | None = None


@observed
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[ChunkRows],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    tile_slots: int = 2048,
    need_lse: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Return the attention output [T, Hq, Dv] in the type of ``q``, and each chunk's log-sum-exp [Hq, n] float32.

    Query head i reads KV head i // (Hq / H). A key is visible if it holds a token that is not later than the
    query, and window and reach both admit it. A query that sees nothing gives zeros and -inf. Rows of no chunk are
    left as memory is.

    Args:
        q: [T, Hq, Dk], rotated.
        k: [T, H, Dk], the chunks' own keys; not read from the pool.
        v: [T, H, Dv], likewise.
        chunks: which rows are whose.
        scale: factor of the dot product.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        sinks: [Hq] logits that take part in each head's denominator, unscaled; part of the log-sum-exp.
        window: visible are positions > query - window.
        tile_slots: past slots that torch's form holds at a time, rounded up to whole blocks.
        need_lse: return the log-sum-exps; else an empty list.
    """
    path = choose(q.device, native=native.covers(q, v))
    if path == "native":
        return native.chunk_attention(
            q, k, v, chunks, scale=scale, softcap=softcap, sinks=sinks, window=window, need_lse=need_lse
        )
    form = reference.chunk_attention if path == "reference" else torch_path.chunk_attention
    out, found = q.new_empty((*q.shape[:2], v.shape[-1])), []
    for chunk in chunks:
        rows = slice(chunk.start, chunk.start + chunk.count)
        out[rows], lse = form(
            q[rows], k[rows], v[rows], chunk.positions, chunk.past, scale=scale, softcap=softcap, sinks=sinks,
            window=window, reach=chunk.reach, tile_slots=tile_slots,
        )  # fmt: skip
        found.append(lse)
    return out, found if need_lse else []
