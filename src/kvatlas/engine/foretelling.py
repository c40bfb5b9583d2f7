"""How likely each new token was, kept beside it for stages that ask for `Logprobs`.

Shapes: N rows of logits, V tokens of the vocabulary, n new tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from kvatlas.engine.segments import Chunk, DecodeGroup, sequence_of
from kvatlas.storage.sequence import Sequence, Slots

_ROWS_AT_ONCE = 32  # whose probabilities are held in float32 at a time: a row may have 256K of them


def note_logprobs(chunks: Seq[Chunk], groups: Seq[DecodeGroup], tokens: Tensor, row_of: Tensor, logits: Tensor) -> None:
    """Put beside the new tokens of a batch how likely each was, and remember what may come next.

    Args:
        chunks: of the batch.
        groups: of the batch.
        tokens: [T] int64, all tokens of the batch.
        row_of: [T] int64, which row of the logits is a token's; -1: none.
        logits: [N, V], of what follows those tokens.
    """
    for chunk in chunks:
        if chunk.request.plan.logprobs:
            rows = slice(chunk.start, chunk.start + chunk.count)
            seq = sequence_of(chunk.request)
            _write(seq, chunk.slots, _logprobs(seq, tokens[rows], logits[row_of[rows]]))
    for group in groups:
        if group.plan.logprobs:
            found = [
                _logprobs(seq, tokens[[group.start + place]], logits[row_of[[group.start + place]]])
                for place, seq in enumerate(group.seqs)
            ]
            _write(group.seqs[0], group.slots, torch.cat(found))


def _logprobs(seq: Sequence, tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the log-probability [n] of each new token; those of what comes next are remembered."""
    first = logits.new_zeros(1, dtype=torch.float32) if seq.foretold is None else seq.foretold[tokens[:1]]
    found = [first]
    for start in range(1, len(tokens), _ROWS_AT_ONCE):
        following = tokens[start : start + _ROWS_AT_ONCE]
        before = logits[start - 1 : start - 1 + len(following)].float().log_softmax(dim=-1)
        found.append(before.gather(-1, following[:, None])[:, 0])
    seq.foretold = logits[-1].float().log_softmax(dim=-1)
    return torch.cat(found)


def _write(seq: Sequence, slots: Slots, logprobs: Tensor) -> None:
    """Write what is known of n tokens to their slots of every lane, class by class."""
    assert slots.side is not None
    for group in seq.layout.groups:
        if group.side is not None and group.side.layout.has("logprobs"):
            where = slots.side[:, group.lanes], slots.offset[:, group.lanes]
            group.side.pool.view("logprobs")[where] = logprobs[:, None, None].expand(*where[0].shape, 1)
