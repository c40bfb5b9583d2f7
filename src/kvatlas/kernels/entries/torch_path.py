"""Products with entries by torch: all entries are gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from kvatlas.kernels.gather import gather_slots
from kvatlas.kernels.pool import Entries


def num_entries(entries: Entries) -> Tensor:
    """Return how many entries of each lane [R, H] are in use."""
    every = entries.pool.layout.every(entries.name)
    return (entries.length + (every - 1)) // every


def dot_entries(q: Tensor, entries: Entries) -> Tensor:
    """As :func:`kvatlas.kernels.entries.dot_entries`."""
    found = gather_slots(entries.pool.view(entries.name), entries.table).float()
    # Head by head and over the last dimension alone, so that no number depends on who else is in the batch.
    products = torch.stack([(found * q[:, :, g, None].float()).sum(dim=-1) for g in range(q.shape[2])], dim=2)
    used = torch.arange(found.shape[2], device=q.device) < num_entries(entries)[..., None]
    return products.masked_fill(~used[:, :, None], -torch.inf)
