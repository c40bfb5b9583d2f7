"""Encoding and reading whole blocks in every format, beside torch's plain copy of the same numbers.

What a strategy pays to change the format of keys and values, and what a form pays that decodes before it attends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from kvatlas.bench.timing import take_turns
from kvatlas.core.layout import DEFAULT_BLOCK_SIZE, GRANULE, BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import encode_blocks, read_keys, read_values
from kvatlas.kernels.pool import BlockPool

COPY = "torch copy of float32"
_HEAD_DIM = 128


def measure_blocks(formats: Sequence[Format], count: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per operation and format, as plain JSON values.

    Args:
        formats: to encode into and to read.
        count: blocks of 32 tokens and head_dim 128 in one call.
        threads: what torch uses already.
        repeats: rounds.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, count, DEFAULT_BLOCK_SIZE, _HEAD_DIM, generator=generator).unbind()
    target = torch.empty_like(keys)
    forms: dict[str, Callable[[], object]] = {f"copy {COPY}": lambda: (target.copy_(keys), target.copy_(values))}
    for format in formats:
        layout = BlockLayout(key_dim=_HEAD_DIM, value_dim=_HEAD_DIM, format=format, positions=False)
        pool = BlockPool(torch.zeros(count * layout.block_bytes, dtype=torch.uint8), layout)
        ids = torch.randperm(count, generator=generator) * (layout.block_bytes // GRANULE)
        encode_blocks(pool, ids, keys, values)
        forms[f"encode {format.value}"] = partial(encode_blocks, pool, ids, keys, values)
        forms[f"read {format.value}"] = partial(_read, pool, ids)
    timings = take_turns(forms, repeats)
    elements = keys.numel() + values.numel()
    return [
        {
            "operation": name.split(" ", 1)[0],
            "format": name.split(" ", 1)[1],
            "blocks": count,
            "threads": threads,
            "wall_ms": timing.wall_s * 1e3,
            "cpu_ms": timing.cpu_s * 1e3,
            "elements_per_s": elements / timing.wall_s,
        }
        for name, timing in timings.items()
    ]


def _read(pool: BlockPool, ids: torch.Tensor) -> None:
    read_keys(pool, ids, torch.float32)
    read_values(pool, ids, torch.float32)
