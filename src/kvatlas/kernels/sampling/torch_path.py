"""Drawing tokens by torch: all rows are sorted at once, and nothing is looked at before the tokens come.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """As :func:`kvatlas.kernels.sampling.draw`."""
    device, vocabulary = logits.device, logits.shape[-1]
    temperature, top_k, top_p, uniform = (each.to(device) for each in (temperature, top_k, top_p, uniform))
    highest = logits.amax(dim=-1, keepdim=True)
    odd = logits.isnan().any(dim=-1) | ~highest[:, 0].isfinite()
    weights = ((logits - highest).double() / temperature[:, None].double()).exp().masked_fill(odd[:, None], 1.0)
    values, order = weights.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(vocabulary, device=device)
    values = values.masked_fill(place >= torch.where(top_k > 0, top_k, vocabulary)[:, None], 0.0)
    before = values.cumsum(dim=-1) - values
    values = values.masked_fill(before >= (top_p * values.sum(dim=-1))[:, None], 0.0)
    kept = torch.zeros_like(weights).scatter_(-1, order, values)
    passed = kept.cumsum(dim=-1)
    target = (uniform * passed[:, -1])[:, None]
    token = ((passed <= target) | (kept == 0)).int().argmin(dim=-1)
    last = (place * (kept > 0)).amax(dim=-1)  # rounding may leave the target behind all of them
    token = torch.where(passed[:, -1] > target[:, 0], token, last)
    return token.masked_fill(odd, -1).cpu()
