"""Decode attention: one query token per sequence against the slots of its lanes.

The step that every generated token pays in every layer; it also returns the probability of each slot, which
accumulating strategies (H2O, Scissorhands) would otherwise have to compute again.
"""

from __future__ import annotations

from torch import Tensor

from kvatlas.kernels.decode_attention import reference, torch_path
from kvatlas.kernels.dispatch import use_reference
from kvatlas.kernels.visibility import slot_mask

__all__ = ["decode_attention", "slot_mask"]


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    pos_pool: Tensor | None = None,
    query_position: Tensor | None = None,
    mask: Tensor | None = None,
    need_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output [R, Hq, Dv] in the type of ``q``, and the probability mass of each slot.

    Query head i reads KV head i // (Hq / H). A slot is visible if it is in use, holds a token and lies in the
    window. A lane without a visible slot gives zeros. Scores and probabilities are at least float32.

    Args:
        q: [R, Hq, Dk], rotated.
        k_pool: [N, block_size, Dk], any float type; the first dimension may be strided.
        v_pool: [N, block_size, Dv], likewise.
        table: [R, H, C] int32 block ids; all C columns are read, so trim it to the longest lane.
        length: [R, H] slots in use at the front of each lane, at most C * block_size.
        scale: factor of the dot product.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        sinks: [Hq] logits that take part in each head's denominator, unscaled.
        window: visible are positions > query_position - window.
        pos_pool: [N, block_size] int32; if given, slots holding -1 are hidden. A window needs it.
        query_position: [R]; a window needs it.
        mask: what :func:`slot_mask` returned for the same ``length``, ``window``, ``pos_pool``,
            ``query_position``; saves building it again. Additive [R, H, C * block_size] float32.
        need_mass: whether to return the mass.

    Returns:
        The output, and the mass [R, H, C * block_size] float32: the probability of each slot summed over the
        query heads of its group, 0 for hidden slots; None unless ``need_mass``.

    Raises:
        ConfigError: a window without positions.
    """
    form = reference.decode_attention if use_reference() else torch_path.decode_attention
    return form(
        q,
        k_pool,
        v_pool,
        table,
        length,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        window=window,
        pos_pool=pos_pool,
        query_position=query_position,
        mask=mask,
        need_mass=need_mass,
    )
