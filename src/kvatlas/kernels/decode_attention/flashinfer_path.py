"""Decode attention by FlashInfer: to it, each sequence and KV head is a request of one KV head.

Its pages may lie anywhere: a stride of one granule between pages turns our block ids into its page numbers, so nothing
is copied. It asks more of a call than Triton's form does: equal widths of keys and values in the queries' 16-bit type,
one part, and every slot visible. And its planner wants the lengths on the host, so each call waits for the device; that
costs more than attention itself at usual lengths, so nothing chooses this form but ``KVATLAS_KERNELS=flashinfer``.
A benchmark plans once. Only tests with the mark ``gpu`` run it, where FlashInfer is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvatlas.kernels.pool import TORCH_DTYPES, Part
from kvatlas.kernels.triton_support import why_not_flashinfer

_WORKSPACE_BYTES = 128 << 20
_HEAD_DIMS = (64, 128, 256)
_FEW_HEADS = 4
"""From this many query heads per KV head on, tensor cores pay."""


def why_not(
    q: Tensor,
    parts: Sequence[Part],
    *,
    sinks: Tensor | None = None,
    window: int | None = None,
    slots: Tensor | None = None,
    need_mass: bool = False,
) -> str | None:
    """Return what FlashInfer does not cover about a call, or None."""
    here = why_not_flashinfer(q.device)
    if here is not None:
        return here
    if len(parts) != 1 or slots is not None or window is not None or parts[0].hide_empty:
        return "it wants one part, all of whose slots are visible"
    if sinks is not None or need_mass:
        return "it returns no probabilities, and knows no sinks"
    layout = parts[0].pool.layout
    if not layout.format.is_float or TORCH_DTYPES[layout.format] != q.dtype or q.dtype == torch.float32:
        return f"queries of {q.dtype} over {layout.format.value}"
    if layout.key_dim != layout.value_dim or layout.key_dim not in _HEAD_DIMS:
        return f"heads of {layout.key_dim} and {layout.value_dim} elements"
    return None


def decode_attention(
    q: Tensor,
    parts: Sequence[Part],
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_position: Tensor | None,
    slots: Tensor | None,
    need_mass: bool,
    shared: dict[Any, Any] | None,
) -> tuple[Tensor, list[Tensor] | None]:
    """As :func:`kvatlas.kernels.decode_attention.decode_attention`, for calls that :func:`why_not` does not refuse."""
    return planned(q, parts, scale=scale, softcap=softcap)(), None


def planned(q: Tensor, parts: Sequence[Part], *, scale: float, softcap: float | None = None) -> Callable[[], Tensor]:
    """Return a call that attends, its plan made; waits for the device once.

    Args:
        q: [R, Hq, D].
        parts: one.
        scale: factor of the dot product.
        softcap: cap of the scores, or None.
    """
    (part,) = parts
    pool, (R, H, C) = part.pool, part.table.shape
    size, group = pool.layout.block_size, q.shape[1] // H
    length = part.length.reshape(-1).cpu()
    pages = -(-length // size)
    first = torch.zeros(R * H + 1, dtype=torch.int32)
    first[1:] = pages.cumsum(0)
    used = (torch.arange(C) < pages[:, None]).flatten().nonzero().flatten().to(q.device)
    wrapper = _wrapper(q.device, group >= _FEW_HEADS)
    wrapper.plan(
        first.to(q.device),
        part.table.reshape(-1).index_select(0, used).int(),
        (length - (pages - 1) * size).clamp(min=1).int().to(q.device),
        group,
        1,
        pool.layout.key_dim,
        size,
        pos_encoding_mode="NONE",
        logits_soft_cap=softcap,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
        sm_scale=scale,
    )
    empty = None if bool((length > 0).all()) else (length == 0).to(q.device).view(-1, 1, 1)
    queries, cache = q.reshape(R * H, group, -1), (pool.keys.unsqueeze(1), pool.values.unsqueeze(1))

    def run() -> Tensor:
        out: Tensor = wrapper.run(queries, cache)
        return (out if empty is None else out.masked_fill(empty, 0)).view(R, H * group, -1)

    return run


@cache
def _wrapper(device: torch.device, use_tensor_cores: bool) -> Any:
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    return wrapper(workspace, "HND", use_tensor_cores=use_tensor_cores)
