"""Drawing tokens, one row and one token at a time: the meaning that other forms agree with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """As :func:`kvatlas.kernels.sampling.draw`."""
    rows = zip(*(each.tolist() for each in (logits, temperature, top_k, top_p, uniform)), strict=True)
    return torch.tensor([_draw(*row) for row in rows], dtype=torch.int64)


def _draw(logits: list[float], temperature: float, top_k: int, top_p: float, uniform: float) -> int:
    if any(math.isnan(each) for each in logits) or not math.isfinite(max(logits)):
        return -1
    weights = [math.exp((each - max(logits)) / temperature) for each in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])  # sorted keeps the order of equal ones
    order = order[: top_k or None]
    total, kept, passed = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if passed < top_p * total:
            kept.append(token)
            passed += weights[token]
    kept = sorted(token for token in kept if weights[token] > 0)
    target, passed = uniform * sum(weights[token] for token in kept), 0.0
    for token in kept:
        passed += weights[token]
        if passed > target:
            return token
    return kept[-1]
