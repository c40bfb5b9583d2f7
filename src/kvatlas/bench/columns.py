"""Column sums of a chunk, the second pass of prefill in strategies such as H2O, beside torch's form.

Keys are float32 in paged blocks: other formats are decoded once per chunk, which the benchmark of blocks measures.
Shapes: T tokens of the chunk, Hq query heads, H KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvatlas.bench.paged import Content, Lanes
from kvatlas.bench.timing import take_turns
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.chunk_attention import ChunkRows, chunk_attention
from kvatlas.kernels.column_sums import column_sums, torch_path
from kvatlas.kernels.pool import Part

OURS, TORCH = "column sums", "torch form"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One cell.

    Args:
        tokens: of the chunk.
        past: cached tokens before it, a multiple of 32.
        query_heads: of the layer.
        kv_heads: of the layer.
        head_dim: elements of a key.
    """

    tokens: int
    past: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def flop(self) -> float:
        """Multiplications and additions of the scores that causality leaves."""
        pairs = self.tokens * self.past + self.tokens * (self.tokens + 1) // 2
        return 2.0 * self.query_heads * self.head_dim * pairs

    def parts(self) -> list[Part]:
        """Return the past in random blocks."""
        if not self.past:
            return []
        lanes = Lanes(
            batch=1,
            context=self.past,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            cold_bytes=1,
        )
        (part,) = Content.random(lanes).paged(lanes, Format.FP32)
        return [replace(part, table=part.table[0], length=part.length[0])]


CHUNKS = tuple(
    Chunk(tokens=tokens, past=past, query_heads=query_heads, kv_heads=8, head_dim=head_dim)
    for query_heads, head_dim in ((8, 64), (32, 128))
    for tokens in (512, 2048)
    for past in (0, 4096, 16384)
)
QUICK = tuple(chunk for chunk in CHUNKS if chunk.tokens == 512 and chunk.past <= 4096)


def measure_columns(chunks: Sequence[Chunk], threads: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per chunk and form, as plain JSON values.

    Args:
        chunks: what to measure.
        threads: what torch uses already.
        repeats: rounds.
    """
    told = []
    for chunk in chunks:
        forms = _forms(chunk)
        truth = forms[TORCH]()
        timings = take_turns(forms, repeats)
        plain = timings[TORCH]
        told += [
            {
                "query_heads": chunk.query_heads,
                "kv_heads": chunk.kv_heads,
                "head_dim": chunk.head_dim,
                "tokens": chunk.tokens,
                "past": chunk.past,
                "threads": threads,
                "form": name,
                "wall_ms": timing.wall_s * 1e3,
                "cpu_ms": timing.cpu_s * 1e3,
                "over_torch": plain.wall_s / timing.wall_s,
                "over_torch_cpu": plain.cpu_s / timing.cpu_s,
                "flop_per_s": chunk.flop / timing.wall_s,
                "difference": _difference(forms[name](), truth),
            }
            for name, timing in timings.items()
        ]
    return told


_Sums = tuple[list[Tensor], Tensor]


def _forms(chunk: Chunk) -> dict[str, Callable[[], _Sums]]:
    generator = torch.Generator().manual_seed(3)
    shape = chunk.tokens, chunk.kv_heads, chunk.head_dim
    q = torch.randn(chunk.tokens, chunk.query_heads, chunk.head_dim, generator=generator)
    k, v = torch.randn(2, *shape, generator=generator).unbind()
    positions, parts = torch.arange(chunk.past, chunk.past + chunk.tokens), chunk.parts()
    scale = chunk.head_dim**-0.5
    rows = ChunkRows(start=0, count=chunk.tokens, positions=positions, past=parts)
    _, (lse,) = chunk_attention(q, k, v, [rows], scale=scale)
    ours = partial(column_sums, q, k, positions, lse, parts, scale=scale)
    plain = partial(
        torch_path.column_sums, q, k, positions, lse, parts,
        scale=scale, softcap=None, window=None, reach=None, tile_slots=2048,
    )  # fmt: skip
    return {OURS: ours, TORCH: plain}


def _difference(sums: _Sums, truth: _Sums) -> float:
    """Return the largest difference, over the largest sum of the same lanes."""
    pairs = zip([*sums[0], sums[1]], [*truth[0], truth[1]], strict=True)
    return max(float((mine - right).abs().max() / right.max()) for mine, right in pairs)
