"""Products of vectors with the entries of a stream: what selectors score pages or tokens by."""

from __future__ import annotations

from torch import Tensor

from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.entries import native, torch_path
from kvatlas.kernels.observed import num_blocks, observed_reads
from kvatlas.kernels.pool import Entries

__all__ = ["dot_entries"]


def _bytes(q: Tensor, entries: Entries) -> int:
    """Return the bytes of entries that a call reads."""
    return num_blocks(entries) * entries.pool.layout.num_bytes(entries.name)


@observed_reads(_bytes)
def dot_entries(q: Tensor, entries: Entries) -> Tensor:
    """Return the products of vectors with all entries of their lane, float32 [R, H, G, P]; -inf behind the last.

    P is as many as the columns of the table hold.

    Args:
        q: [R, H, G, W].
        entries: of a stream of W floats an entry: one per slot, or per so many slots.
    """
    if choose(q.device, native=native.covers(q, entries)) == "native":
        return native.dot_entries(q, entries)
    return torch_path.dot_entries(q, entries)
