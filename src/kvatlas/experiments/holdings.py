"""What one request holds, part by part and tier by tier."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.storage.arena import SideClass
from kvatlas.storage.sequence import Sequence
from kvatlas.storage.store import KVStore


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Bytes of blocks that a request holds, unused slots included.

    Args:
        device_kv: keys and values on the device.
        device_sidecars: positions and padding of those blocks, and what lies beside blocks of any tier.
        device_sketch: streams that are made once a prompt is over, such as partial keys.
        device_staging: blocks that layers on the host are read through, those that stay between steps among them.
        host_kv: keys and values on the host.
        host_sidecars: positions and padding of those blocks.
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
    sketch, later = 0, {stream.name for _, layer in seq.layout.plan.layers for stream, _ in layer.later}
    for row in seq.parts:
        held = store.columns_held(row)
        for group in row.layout.groups:
            count = int(held[group.lanes].sum())
            tier = "device" if group.blocks.arena is store.arena else "host"
            kv[tier] += count * group.blocks.kv_bytes
            blocks[tier] += count * group.blocks.block_bytes
        if row.side is not None:
            for beside in row.side.layout.groups:
                num_bytes = int(store.columns_held(row.side)[beside.lanes].sum()) * beside.blocks.block_bytes
                if isinstance(beside.blocks, SideClass) and later & {s.name for s in beside.blocks.layout.streams}:
                    sketch += num_bytes
                else:
                    blocks["device"] += num_bytes
    if seq.records is not None:
        blocks["device"] += store.row_bytes([seq.records], store.arena)[0]
    return Holdings(
        device_kv=kv["device"],
        device_sidecars=blocks["device"] - kv["device"],
        device_sketch=sketch,
        device_staging=sum(store.row_bytes(seq.passing, store.arena)),
        host_kv=kv["host"],
        host_sidecars=blocks["host"] - kv["host"],
    )
