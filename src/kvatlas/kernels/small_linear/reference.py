"""The small-batch linear in float64, one output at a time: the meaning that other forms agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return float32 [..., N] of ``x`` [..., K], decoded ``weight`` float64 [N, K] and ``bias`` [N]."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).double()
    out = torch.zeros(len(rows), len(weight), dtype=torch.float64, device=x.device)
    for output, row in enumerate(weight):
        out[:, output] = (rows * row).sum(dim=1)
    if bias is not None:
        out += bias.double()
    return out.float().reshape(*x.shape[:-1], len(weight))
