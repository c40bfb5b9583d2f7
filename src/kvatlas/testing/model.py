"""The model of the checks: so small that a run takes a moment, and so sharp that a wrong token is noticed."""

from __future__ import annotations

from functools import cache

import torch

from kvatlas.models.loading import LoadedModel
from kvatlas.models.random import RandomSize, build_random
from kvatlas.testing.driving import loaded

_SIZE = RandomSize(layers=3, hidden=64, intermediate=96, query_heads=4, kv_heads=2, head_dim=16, vocab=101)
_SHARPER = 8  # than random weights are, under which attention is nearly uniform and hardly depends on what is kept


@cache
def tiny_model() -> LoadedModel:
    """Return a random Llama in float32, the same each time: 3 layers, 4 query and 2 KV heads of 16, 101 token ids."""
    model = build_random(_SIZE)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(_SHARPER)
    return loaded(model.eval())


def tokens(count: int, seed: int = 0) -> list[int]:
    """Return ``count`` random token ids of `tiny_model`, equal for equal arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, _SIZE.vocab, (count,), generator=generator).tolist()
