"""The plainest attention context: every sequence keeps all its keys and values, and each query reads them.

Slow and obvious on purpose: it is the truth that the load-time probe and the parity tests compare with.
Shapes: t new tokens of one sequence, n its cached tokens; H, Hq, Dk, Dv as in `kvatlas.models.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.models.attention import AttentionCall


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring rows of a packed batch that belong to one sequence.

    Args:
        sequence: which one.
        start: position of the first row in that sequence.
        num_tokens: rows.
    """

    sequence: int
    start: int
    num_tokens: int


class DenseContext:
    """Keeps keys and values per sequence and layer; call `begin` before each forward."""

    def __init__(self) -> None:
        self._segments: tuple[Segment, ...] = ()
        self._cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def begin(self, segments: Sequence[Segment]) -> None:
        """Say which rows of the next batch belong to which sequence, in packed order."""
        self._segments = tuple(segments)

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append the new keys and values, and return the outputs [1, T, Hq, Dv]."""
        outputs = []
        row = 0
        for segment in self._segments:
            rows = slice(row, row + segment.num_tokens)
            keys, values = self._append(call.layer, segment.sequence, key[0, :, rows], value[0, :, rows])
            outputs.append(attend_one(call, query[0, :, rows], keys, values, segment.start))
            row += segment.num_tokens
        return torch.cat(outputs, dim=1).transpose(0, 1)[None].contiguous()

    def _append(self, layer: int, sequence: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys [H, n, Dk] and values [H, n, Dv] of a sequence, the new ones last."""
        if (sequence, layer) in self._cache:
            old_key, old_value = self._cache[sequence, layer]
            key, value = torch.cat((old_key, key), dim=1), torch.cat((old_value, value), dim=1)
        self._cache[sequence, layer] = key, value
        return key, value


def attend_one(call: AttentionCall, query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Return the outputs [Hq, t, Dv] of queries [Hq, t, Dk] over keys [H, n, Dk] and values [H, n, Dv].

    The queries stand at positions ``start, start + 1, ...``, the keys at ``0, 1, ...``.
    """
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    scores = query.float() @ keys.float().transpose(1, 2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    queries_at = start + torch.arange(query.shape[1], device=query.device)[:, None]
    keys_at = torch.arange(keys.shape[1], device=query.device)[None, :]
    visible = keys_at <= queries_at
    if call.window is not None:
        visible &= keys_at > queries_at - call.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if call.sinks is not None:
        column = call.sinks.float()[:, None, None].expand(-1, query.shape[1], 1)
        scores = torch.cat((scores, column), dim=2)
    weights = scores.softmax(dim=-1)[..., : keys.shape[1]]
    return (weights @ values.float()).to(query.dtype)
