"""Choosing by torch operations: sorts, of which nothing is looked at on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_best(score: Tensor, number: Tensor, always: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.choosing.choose_best`."""
    score, n = score.nan_to_num(nan=-torch.inf, neginf=-torch.inf), score.shape[-1]  # infinity is the largest number
    number = number.to(score.device)
    if always is not None:
        surely = torch.arange(n, device=score.device) == always.to(score.device)[..., None]
        score = score.masked_fill(surely, torch.inf)
    held = score > -torch.inf
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    taken = held.gather(-1, best) & (torch.arange(most, device=score.device) < number[..., None])
    index = best.masked_fill(~taken, n).sort(dim=-1).values
    return index.clamp(max=n - 1), taken.sum(dim=-1)


def cut_blocks(
    table: Tensor, length: Tensor, index: Tensor, count: Tensor, first: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """As :func:`kvatlas.kernels.choosing.cut_blocks`."""
    local, columns = index.to(table.device) - first, table.shape[-1]
    meant = torch.arange(index.shape[-1], device=table.device) < count.to(table.device)[..., None]
    used = (length[..., None] - local * block_size).clamp(max=block_size)
    mine = meant & (local >= 0) & (local < columns) & (used > 0)
    order = local.masked_fill(~mine, columns).sort(dim=-1).values.clamp(max=columns - 1)
    return table.gather(-1, order), (used * mine).sum(dim=-1)
