"""Equal prefixes share blocks: one entry per run of ``block_size`` tokens, found by a chained hash.

An entry holds one block of every lane and one reference to each. Its key covers the layout (format and sidecars),
a salt (the RoPE regime) and all tokens before it, so an entry serves only sequences that would have computed
the very same bytes. Strategies that evict, or that need sums over the prefix's own queries, neither publish nor
look up: their prefix is recomputed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.storage.arena import Arena
from kvatlas.storage.eviction import drop_passed_windows
from kvatlas.storage.lanes import SequenceLayout
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore


@dataclass(frozen=True, kw_only=True)
class _Entry:
    layout: SequenceLayout
    ids: Tensor  # [lanes] int32


class PrefixCache:
    """Finds, publishes and reclaims shared prefix blocks.

    Args:
        store: where the blocks live.
    """

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def adopt(self, seq: Sequence, tokens: Seq[int], salt: str) -> int:
        """Give an empty sequence the cached blocks of its longest known prefix; return its length in tokens.

        The last token is never adopted: its logits must be computed.
        """
        store, hits = self._store, []
        for digest in self._hash_blocks(seq, tokens, len(tokens) - 1, salt):
            if digest not in self._entries:
                break
            hits.append(digest)
        if not hits:
            return 0
        columns = torch.stack([self._entries[digest].ids for digest in hits], dim=1)
        store.grow_columns(len(hits))
        store.table[seq.row, :, : len(hits)] = columns
        store.length[seq.row] = len(hits) * store.block_size
        seq.seen, seq.shared = len(hits) * store.block_size, True
        for group in seq.layout.groups:
            group.blocks.arena.add_reference(group.blocks, columns[group.lanes].flatten())
        self._touch(hits)
        drop_passed_windows(store, seq)
        return seq.seen

    def publish(self, seq: Sequence, tokens: Seq[int], salt: str, done: int) -> None:
        """Add the full blocks of the first ``seq.seen`` tokens; those before ``done`` tokens are known already."""
        store, size = self._store, self._store.block_size
        digests = self._hash_blocks(seq, tokens, seq.seen, salt)
        for index in range(done // size, len(digests)):
            if digests[index] in self._entries:
                continue
            if index and digests[index - 1] not in self._entries:
                break
            columns = torch.full((store.lanes.count,), index, dtype=torch.int64)
            for window, lanes in store.lanes.windows.items():
                columns[lanes] -= seq.starts[window] // size
            if int(columns.min()) < 0:
                break  # a window has passed this block already, and entries behind a gap are never found
            ids = store.table[seq.row].gather(1, columns[:, None]).squeeze(1)
            for group in seq.layout.groups:
                group.blocks.arena.add_reference(group.blocks, ids[group.lanes])
                group.blocks.arena.mark_cached(group.blocks, ids[group.lanes], True)
            self._entries[digests[index]] = _Entry(layout=seq.layout, ids=ids)
            seq.shared = True
        self._touch(digests)

    def reclaim(self, wanted_bytes: int, tier: Arena | None = None) -> int:
        """Give up entries, least recently used first, until ``wanted_bytes`` are free; return the bytes freed.

        An entry whose blocks are all in use stays: to give it up would free nothing. Bytes are those of ``tier``;
        None: of the device.
        """
        freed = 0
        for digest in list(self._entries):
            if freed >= wanted_bytes:
                break
            freed += self._drop(digest, tier or self._store.arena)
        return freed

    def _drop(self, digest: bytes, tier: Arena) -> int:
        entry, freed = self._entries[digest], 0
        for group in entry.layout.groups:
            if group.blocks.arena is tier:
                owners = tier.num_owners(group.blocks, entry.ids[group.lanes])
                freed += int((owners == 1).sum()) * group.blocks.block_bytes
        if not freed:
            return 0
        for group in entry.layout.groups:
            ids = entry.ids[group.lanes]
            group.blocks.arena.mark_cached(group.blocks, ids, False)
            group.blocks.arena.release(group.blocks, ids)
        del self._entries[digest]
        return freed

    def _touch(self, digests: Seq[bytes]) -> None:
        """Make a chain recently used, its beginning most of all: an entry is worthless without those before it."""
        for digest in reversed(digests):
            if digest in self._entries:
                self._entries.move_to_end(digest)

    def _hash_blocks(self, seq: Sequence, tokens: Seq[int], end: int, salt: str) -> list[bytes]:
        """Return the chained hashes of the full blocks of ``tokens[:end]``; those known are not computed again."""
        size = self._store.block_size
        for start in range(len(seq.digests) * size, end - size + 1, size):
            root = f"{seq.layout.key}{salt}".encode()
            before = seq.digests[-1] if seq.digests else hashlib.blake2b(root, digest_size=16).digest()
            block = b"".join(int(token).to_bytes(4, "little") for token in tokens[start : start + size])
            seq.digests.append(hashlib.blake2b(before + block, digest_size=16).digest())
        return seq.digests[: end // size]
