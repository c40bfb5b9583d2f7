"""Column sums: how much attention each key received from all queries of a chunk.

The second streaming pass behind accumulating strategies (H2O, KVzip, NACL): with the log-sum-exp of the
first pass every probability can be recomputed tile by tile, so the sums are exact and memory is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kvatlas.core.needs import Heads, Over
from kvatlas.kernels.column_sums import native, reference, torch_path
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.observed import observed
from kvatlas.kernels.pool import Part

__all__ = ["column_sums"]


@observed
def column_sums(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    past: Sequence[Part],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    reach: tuple[int, int] | None = None,
    tile_slots: int = 2048,
    over: Over = "sum",
    heads: Heads = "sum",
) -> tuple[list[Tensor], Tensor]:
    """Return summed probabilities of each part's slots [H, C * block_size] and of the chunk's tokens [H, T].

    The sum runs over the chunk's queries and the query heads of the group; float32. A slot that no query
    sees has 0. Other ways to put queries and heads together than sums run in torch's form. The arguments must be
    those of the chunk attention call that returned ``lse``.

    Args:
        q: [T, Hq, Dk], rotated.
        k: [T, H, Dk], the chunk's own keys.
        positions: [T] int, of the chunk's tokens.
        lse: [Hq, T], from :func:`kvatlas.kernels.chunk_attention.chunk_attention`; with sinks if it had them.
        past: parts of the lanes with the cached tokens, in any format; tables [H, C], lengths [H]. Positions come from
            the pool, -1 for a slot without a token. A part's ``dense_start`` promises that all its lengths are equal
            and slot i holds position dense_start + i: slots that no query can see are then not even read.
        scale: factor of the dot product.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        window: visible are positions > query - window.
        reach: (sink_tokens, recent): visible are positions < sink_tokens or > query - recent.
        tile_slots: past slots that torch's form holds at a time, rounded up to whole blocks.
        over: how what different queries pay is put together, as `kvatlas.core.needs.Received` has it.
        heads: how what the query heads of a group pay is put together, query by query.
    """
    form = _form(q)
    more: dict[str, str] = {}
    if (over, heads) != ("sum", "sum"):
        form = reference.column_sums if form is reference.column_sums else torch_path.column_sums
        more = {"over": over, "heads": heads}
    return form(
        q,
        k,
        positions,
        lse,
        past,
        scale=scale,
        softcap=softcap,
        window=window,
        reach=reach,
        tile_slots=tile_slots,
        **more,
    )


def _form(q: Tensor) -> Callable[..., tuple[list[Tensor], Tensor]]:
    path = choose(q.device, native=native.covers(q), triton=True)
    if path == "native":
        return native.column_sums
    if path == "triton":
        from kvatlas.kernels.column_sums import triton_path  # needs the package triton

        if triton_path.why_not(q) is None:
            return triton_path.column_sums
    return reference.column_sums if path == "reference" else torch_path.column_sums
