"""Equal prefixes share blocks: one entry per run of ``block_size`` tokens, found by a chained hash.

An entry holds one block of every lane and one reference to each. Its key covers the storage formats and tiers, a salt
(the RoPE regime) and all tokens before it, so an entry serves only sequences that would have computed the very same
keys and values. Who cuts its cache is given a copy, which is its own; the others share the entry's blocks. What lies
beside blocks is each sequence's own, and made anew from keys and values; so what is known only of a request's own past
queries is in no entry.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from kvatlas.storage.arena import Arena, copy_blocks
from kvatlas.storage.eviction import drop_passed_windows
from kvatlas.storage.lanes import SequenceLayout
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore
from kvatlas.storage.streams import derive_blocks


@dataclass(frozen=True, kw_only=True)
class _Entry:
    layout: SequenceLayout
    ids: Tensor  # [lanes] int32
    lent: bool  # by a sequence that will be cut, so that no other may own these blocks


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

    def adopt(self, seq: Sequence, tokens: Seq[int], salt: str, *, most: int, cuts: bool = False) -> int:
        """Give an empty sequence its longest known prefix; return its length in tokens.

        Args:
            seq: the sequence.
            tokens: its prompt.
            salt: what must be equal beside them.
            most: tokens that may be adopted: the last one's logits must be computed, at least.
            cuts: whether tokens will be dropped, so that no block may have another owner.
        """
        store = self._store
        hits: Seq[bytes] = []
        for digest in self._hash_blocks(seq, tokens, max(0, min(most, len(tokens) - 1)), salt):
            if digest not in self._entries:
                break
            hits = [*hits, digest]
        self._touch(hits)
        if cuts or any(self._entries[digest].lent for digest in hits):
            self._copy(seq, hits)
        elif hits := self._with_room_beside(seq, hits):
            columns = torch.stack([self._entries[digest].ids for digest in hits], dim=1)
            store.tables.enter_all(seq.row, columns)
            seq.seen, seq.shared = len(hits) * store.block_size, True
            for group in seq.layout.groups:
                group.blocks.arena.add_reference(group.blocks, columns[group.lanes].flatten())
            self._derive(seq, 0, len(hits))
            drop_passed_windows(store, seq)
        return seq.seen

    def _copy(self, seq: Sequence, hits: Seq[bytes]) -> None:
        """Give a sequence copies of entries, as many as there is room for; all at once, where no window passes any."""
        step = 1 if self._store.lanes.windows else len(hits)
        while hits := list(takewhile(lambda digest: digest in self._entries, hits)):
            part = self._with_room(seq, hits[:step])
            if not part:
                return
            first = seq.seen // self._store.block_size
            self._store.append(seq, len(part) * self._store.block_size)
            for column, digest in enumerate(part, first):
                self._fill(seq, column, self._entries[digest])
            self._derive(seq, first, first + len(part))
            drop_passed_windows(self._store, seq)
            hits = hits[len(part) :] if len(part) == step else []

    def _with_room(self, seq: Sequence, hits: Seq[bytes]) -> Seq[bytes]:
        """Return those that room could be made for, by giving up others if need be."""
        while hits:
            count = len(hits) * self._store.block_size
            if self._store.try_extend(seq, count):
                return hits
            needs = self._store.blocks_needed(seq, count)
            tier = self._store.short_of(needs) or self._store.arena
            wanted = sum(number * group.blocks.block_bytes for group, number in needs if group.blocks.arena is tier)
            if not self.reclaim(wanted, tier):
                return hits[:0]
            hits = list(takewhile(lambda digest: digest in self._entries, hits))
        return hits

    def _with_room_beside(self, seq: Sequence, hits: Seq[bytes]) -> Seq[bytes]:
        """Return those beside which there could be made room for a sequence's own streams."""
        groups = [] if seq.side is None else seq.side.layout.groups
        column_bytes = sum(len(group.lanes) * group.blocks.block_bytes for group in groups)
        while hits and not self._store.try_lie_beside(seq, len(hits) * self._store.block_size):
            if not self.reclaim(len(hits) * column_bytes):
                return hits[:0]
            hits = list(takewhile(lambda digest: digest in self._entries, hits))
        return hits

    def _fill(self, seq: Sequence, column: int, entry: _Entry) -> None:
        """Copy an entry's keys and values to a column of blocks."""
        columns = self._columns(seq, column)
        for group in seq.layout.groups:
            ids = self._store.table[seq.row, group.lanes, columns[group.lanes]]
            copy_blocks(group.blocks, entry.ids[group.lanes].long(), group.blocks, ids.long())

    def _derive(self, seq: Sequence, first: int, until: int) -> None:
        """Make what a sequence keeps beside its blocks of tokens ``first`` to ``until``, all of which are full."""
        store = self._store
        for group in seq.layout.groups:
            if group.derived and group.side is not None:
                columns = [self._columns(seq, index)[group.lanes] for index in range(first, until)]
                home, beside = (
                    torch.cat([store.table[row.row, group.lanes, column] for column in columns])
                    for row in seq.with_side
                )
                used = torch.full((len(home),), store.block_size)
                derive_blocks(group.side, group.derived, beside, group.blocks, home, used)

    def publish(self, seq: Sequence, tokens: Seq[int], salt: str, done: int, *, cuts: bool = False) -> None:
        """Add the full blocks of a sequence.

        Args:
            seq: the sequence, of whose tokens all are in its cache.
            tokens: of which the first ``seq.seen`` count.
            salt: what must be equal beside them.
            done: so many are known already.
            cuts: whether tokens will be dropped; what such a sequence lends is exchanged for what stays.
        """
        store, size = self._store, self._store.block_size
        digests = self._hash_blocks(seq, tokens, seq.seen, salt)
        for index in range(done // size, len(digests)):
            known = self._entries.get(digests[index])
            if known is not None and (cuts or not known.lent):
                continue
            if index and digests[index - 1] not in self._entries:
                break
            columns = self._columns(seq, index)
            if int(columns.min()) < 0:
                break  # a window has passed this block already, and entries behind a gap are never found
            ids = store.table[seq.row].gather(1, columns[:, None]).squeeze(1)
            for group in seq.layout.groups:
                group.blocks.arena.add_reference(group.blocks, ids[group.lanes])
                group.blocks.arena.mark_cached(group.blocks, ids[group.lanes], True)
            if known is not None:
                self._forget(digests[index])
            self._entries[digests[index]] = _Entry(layout=seq.layout, ids=ids, lent=cuts)
            seq.shared = True
        self._touch(digests)

    def withdraw(self, seq: Sequence) -> None:
        """Forget the entries that hold blocks of a sequence, so that these are its alone again."""
        table, end = self._store.table[seq.row], self._store.columns_held(seq)  # ids behind it are stale
        for index, digest in enumerate(seq.digests):
            columns = self._columns(seq, index)
            held = table.gather(1, columns.clamp(min=0, max=table.shape[1] - 1)[:, None]).squeeze(1)
            entry = self._entries.get(digest)
            if entry is not None and bool(((entry.ids == held) & (columns >= 0) & (columns < end)).any()):
                self._forget(digest)

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
        if freed:
            self._forget(digest)
        return freed

    def _forget(self, digest: bytes) -> None:
        entry = self._entries.pop(digest)
        for group in entry.layout.groups:
            ids = entry.ids[group.lanes]
            group.blocks.arena.mark_cached(group.blocks, ids, False)
            group.blocks.arena.release(group.blocks, ids)

    def _columns(self, seq: Sequence, index: int) -> Tensor:
        """Return where each lane [lanes] has the block of tokens ``index``; negative: a window has passed it."""
        columns = torch.full((self._store.lanes.count,), index, dtype=torch.int64)
        for window, lanes in self._store.lanes.windows.items():
            columns[lanes] -= seq.starts[window] // self._store.block_size
        return columns

    def _touch(self, digests: Seq[bytes]) -> None:
        """Make a chain recently used, its beginning most of all: an entry is worthless without those before it."""
        for digest in reversed(digests):
            if digest in self._entries:
                self._entries.move_to_end(digest)

    def _hash_blocks(self, seq: Sequence, tokens: Seq[int], end: int, salt: str) -> list[bytes]:
        """Return the chained hashes of the full blocks of ``tokens[:end]``; those known are not computed again."""
        size = self._store.block_size
        for start in range(len(seq.digests) * size, end - size + 1, size):
            root = f"{seq.layout.plan.contents}{salt}".encode()
            before = seq.digests[-1] if seq.digests else hashlib.blake2b(root, digest_size=16).digest()
            block = b"".join(int(token).to_bytes(4, "little") for token in tokens[start : start + size])
            seq.digests.append(hashlib.blake2b(before + block, digest_size=16).digest())
        return seq.digests[: end // size]
