"""Decode attention: one query token per sequence against the slots of its lanes.

The step that every generated token pays in every layer; it also returns the probability of each slot, which
accumulating strategies (H2O, Scissorhands) would otherwise have to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvatlas.core.errors import ConfigError
from kvatlas.core.observer import NULL, Counter, SpanKind, current_observer
from kvatlas.kernels import triton_support
from kvatlas.kernels.blocks import native as native_blocks, write_slots
from kvatlas.kernels.decode_attention import flashinfer_path, native, reference, torch_path
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.observed import num_blocks
from kvatlas.kernels.pool import Credit, Part
from kvatlas.kernels.visibility import check_window

__all__ = ["NewTokens", "decode_attention"]


class NewTokens(NamedTuple):
    """Tokens of a step on their way to slots that are not packed.

    Args:
        block: int64 [R, H] block ids.
        offset: int64 [R, H] slots of these blocks.
        k: [R, H, Dk] keys.
        v: [R, H, Dv] values.
    """

    block: Tensor
    offset: Tensor
    k: Tensor
    v: Tensor


def decode_attention(
    q: Tensor,
    parts: Sequence[Part],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    query_position: Tensor | None = None,
    slots: Tensor | None = None,
    need_mass: bool = False,
    shared: dict[Any, Any] | None = None,
    new: NewTokens | None = None,
    credit: Credit | None = None,
) -> tuple[Tensor, list[Tensor] | None]:
    """Return the attention output [R, Hq, Dv] in the type of ``q``, and the probability mass of each slot.

    A lane is the concatenation of its parts, which may differ in format. Query head i reads KV head i // (Hq / H). A
    slot is visible if it is in use, holds a token (where the part hides empty slots) and lies in the window. A lane
    without a visible slot gives zeros. Scores and probabilities are at least float32. Over packed formats the reference
    and the native form round the queries and the weights to 8 bits, block by block; see `reference`.

    Args:
        q: [R, Hq, Dk], rotated.
        parts: at least one; tables [R, H, C], lengths [R, H].
        scale: factor of the dot product.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        sinks: [Hq] logits that take part in each head's denominator, unscaled.
        window: visible are positions > query_position - window; positions come from ``dense_start`` or the pool.
        query_position: [R]; a window needs it.
        slots: [R, H, S'] int32 slots to read, each once, in any order, of the only part; its length then counts these.
        need_mass: whether to return the mass.
        shared: a dict that the torch form keeps masks in. Pass the same one for layers whose tables, lengths and
            positions are equal, in one step; other forms ignore it.
        new: tokens to write to the last part's blocks first, as `kvatlas.kernels.blocks.write_slots` does: a step
            chooses its form once for both.
        credit: where the mass is added instead of being returned; not with ``slots``.

    Returns:
        The output, and for each part the mass [R, H, C * block_size] float32 (with ``slots``: [R, H, S']): the
        probability of each slot summed over the query heads of its group, 0 for hidden slots; None unless
        ``need_mass``.

    Raises:
        ConfigError: a window without positions, no part, or slots of several parts.
    """
    arguments = q, parts, scale, softcap, sinks, window, query_position, slots, need_mass, shared, new, credit
    observer = current_observer()
    if observer is NULL:
        return _decode_attention(*arguments)
    observer.count(Counter.READ_BYTES, lambda: _read_bytes(parts, slots))
    with observer.span(SpanKind.KERNEL, name="decode_attention"):
        return _decode_attention(*arguments)


def _decode_attention(
    q: Tensor,
    parts: Sequence[Part],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_position: Tensor | None,
    slots: Tensor | None,
    need_mass: bool,
    shared: dict[Any, Any] | None,
    new: NewTokens | None,
    credit: Credit | None,
) -> tuple[Tensor, list[Tensor] | None]:
    if not parts or (slots is not None and len(parts) > 1):
        raise ConfigError(
            f"got {len(parts)} parts of each lane; expected one or more, and only one where slots are given"
        )
    for part in parts:
        check_window(part, window, query_position)
    form = _form(q, parts, slots, window=window, sinks=sinks, need_mass=need_mass or credit is not None)
    if new is not None:
        write = native_blocks.write_slots if form is native.decode_attention else write_slots
        write(parts[-1].pool, new.block, new.offset, new.k, new.v)
    at_once = credit is not None and form is native.decode_attention
    out, masses = form(
        q,
        parts,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        window=window,
        query_position=query_position,
        slots=slots,
        need_mass=need_mass or (credit is not None and not at_once),
        shared=shared,
        **({"credit": credit} if at_once else {}),
    )
    if credit is not None and masses is not None:
        credit.add(masses)
        masses = None
    return out, masses


def _read_bytes(parts: Sequence[Part], slots: Tensor | None) -> int:
    """Return the bytes of keys and values that a call reads: of whole blocks, where no slots are given."""
    if slots is None:
        return sum(num_blocks(part) * part.pool.layout.kv_bytes for part in parts)
    return sum(int(part.length.sum()) * part.pool.layout.kv_bytes // part.pool.layout.block_size for part in parts)


def _form(
    q: Tensor, parts: Sequence[Part], slots: Tensor | None, **more: Any
) -> Callable[..., tuple[Tensor, list[Tensor] | None]]:
    path = choose(q.device, native=native.covers(q), triton=True, flashinfer=True)
    if path == "flashinfer":
        if flashinfer_path.why_not(q, parts, slots=slots, **more) is None:
            return flashinfer_path.decode_attention
        path = "triton" if triton_support.why_not(q.device) is None else "torch"
    if path == "triton":
        from kvatlas.kernels.decode_attention import triton_path  # needs the package triton

        if triton_path.why_not(q, parts, slots) is None:
            return triton_path.decode_attention
        return torch_path.decode_attention
    if path == "native":
        return native.decode_attention
    return reference.decode_attention if path == "reference" else torch_path.decode_attention
