"""What one request holds, part by part and tier by tier."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Bytes of blocks that a request holds, unused slots included.

    Args:
        device_kv: keys and values on the device.
        device_sidecars: positions, sums and padding of those blocks.
        device_sketch: partial keys.
        device_staging: buffers that layers on the host are read through.
        host_kv: keys and values on the host.
        host_sidecars: positions, sums and padding of those blocks.
    """

    device_kv: int
    device_sidecars: int
    device_sketch: int
    device_staging: int
    host_kv: int
    host_sidecars: int


def holdings(store: KVStore, seq: Sequence) -> Holdings:
    """Return what ``seq`` holds now; blocks shared with others count in full."""
    kv = {"device": 0, "host": 0}
    blocks = dict(kv)
    for row in (seq, seq.encoded):  # the newest tokens, and the old ones in a packed format
        if row is None:
            continue
        held = store.columns_held(row)
        for group in row.layout.groups:
            count = int(held[group.lanes].sum())
            tier = "device" if group.blocks.arena is store.arena else "host"
            kv[tier] += count * group.blocks.layout.kv_bytes
            blocks[tier] += count * group.blocks.block_bytes
    companions = [0 if row is None else store.row_bytes([row], store.arena)[0] for row in (seq.sketch, seq.staging)]
    return Holdings(
        device_kv=kv["device"],
        device_sidecars=blocks["device"] - kv["device"],
        device_sketch=companions[0],
        device_staging=companions[1],
        host_kv=kv["host"],
        host_sidecars=blocks["host"] - kv["host"],
    )
