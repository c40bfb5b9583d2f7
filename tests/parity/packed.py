"""Drive an adapter the way an engine does: sequences join late, prefill in chunks, and decode side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvatlas.models.adapter import Adapter
from kvatlas.models.dense_context import DenseContext, Segment


def packed_logits(adapter: Adapter, sequences: Sequence[Tensor], *, chunk: int = 7) -> list[Tensor]:
    """Return the logits [n, V] of every token of each sequence, computed in mixed batches.

    Sequence i joins at step i; its first half is prefilled in chunks, the rest decoded token by token.
    """
    context = DenseContext()
    rows: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    step = 0
    while any(at < len(ids) for at, ids in zip(done, sequences, strict=True)):
        batches: dict[object, list[Segment]] = {}
        for index, ids in enumerate(sequences[: step + 1]):
            prompt = len(ids) // 2
            num = min(chunk, prompt - done[index]) if done[index] < prompt else min(1, len(ids) - done[index])
            if num > 0:
                segment = Segment(sequence=index, start=done[index], num_tokens=num)
                batches.setdefault(adapter.rope_regime(len(ids)), []).append(segment)
        for batch in batches.values():
            for segment, logits in zip(batch, _run(adapter, context, batch, sequences), strict=True):
                rows[segment.sequence].append(logits)
                done[segment.sequence] += segment.num_tokens
        step += 1
    return [torch.cat(parts) for parts in rows]


def _run(
    adapter: Adapter, context: DenseContext, batch: Sequence[Segment], sequences: Sequence[Tensor]
) -> list[Tensor]:
    context.begin(batch)
    ids, positions = [], []
    for segment in batch:
        span = range(segment.start, segment.start + segment.num_tokens)
        ids.append(sequences[segment.sequence][span.start : span.stop])
        positions.append(torch.tensor(span))
    logits = adapter.forward(
        torch.cat(ids),
        torch.cat(positions),
        context,
        torch.arange(sum(s.num_tokens for s in batch)),
        rope_tokens=max(len(sequences[s.sequence]) for s in batch),
    )
    return list(torch.split(logits, [s.num_tokens for s in batch]))
