"""Column sums: how much attention each key received from all queries of a chunk.

The second streaming pass behind accumulating strategies (H2O, KVzip, NACL): with the log-sum-exp of the
first pass every probability can be recomputed tile by tile, so the sums are exact and memory is linear.
"""

from __future__ import annotations

from torch import Tensor

from kvatlas.kernels.column_sums import reference, torch_path
from kvatlas.kernels.dispatch import use_reference

__all__ = ["column_sums"]


def column_sums(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    k_pool: Tensor,
    pos_pool: Tensor,
    table: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    reach: tuple[int, int] | None = None,
    dense_start: int | None = None,
    tile_slots: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Return summed probabilities of past slots [H, C * block_size] and of the chunk's tokens [H, T].

    The sum runs over the chunk's queries and the query heads of the group; float32. A slot that no query
    sees has 0. The arguments must be those of the chunk attention call that returned ``lse``.

    Args:
        q: [T, Hq, Dk], rotated.
        k: [T, H, Dk], the chunk's own keys.
        positions: [T] int, of the chunk's tokens.
        lse: [Hq, T], from :func:`kvatlas.kernels.chunk_attention.chunk_attention`; with sinks if it had them.
        k_pool: [N, block_size, Dk], any float type; the first dimension may be strided.
        pos_pool: [N, block_size] int32, -1 for a slot without a token; not read if ``dense_start`` is given.
        table: [H, C] int32 block ids.
        length: [H] past slots in use at the front of each lane.
        scale: factor of the dot product.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        window: visible are positions > query - window.
        reach: (sink_tokens, recent): visible are positions < sink_tokens or > query - recent.
        dense_start: promise that all lengths are equal and slot i holds position dense_start + i.
        tile_slots: past slots to hold at a time, rounded up to whole blocks.
    """
    form = reference.column_sums if use_reference() else torch_path.column_sums
    return form(
        q,
        k,
        positions,
        lse,
        k_pool,
        pos_pool,
        table,
        length,
        scale=scale,
        softcap=softcap,
        window=window,
        reach=reach,
        dense_start=dense_start,
        tile_slots=tile_slots,
    )
