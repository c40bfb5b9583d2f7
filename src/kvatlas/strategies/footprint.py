"""One formula for the bytes of a request on each tier, used by admission, the tests and the commands. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvatlas.core.footprint import Footprint
from kvatlas.core.layout import BlockLayout
from kvatlas.core.needs import Derived
from kvatlas.core.streams import SideLayout
from kvatlas.core.vocabulary import Per, Tier

if TYPE_CHECKING:
    from kvatlas.strategies.plan import LayerPlan, Plan
    from kvatlas.strategies.stage import Attend


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Slots per lane, on average over a layer's lanes: at the prefill peak, after the prompt, at the end, and read.

    Where ``ragged``, lanes may differ once the prompt is over.
    """

    peak: int
    steady: int
    final: int
    read: int
    ragged: bool = False


@dataclass(kw_only=True)
class _Bytes:
    """Sums over lanes, by the same moments."""

    peak: int = 0
    steady: int = 0
    final: int = 0

    def add(self, layout: BlockLayout | SideLayout, lanes: int, slots: _Slots) -> None:
        """Add whole blocks of ``lanes`` lanes."""
        size = layout.block_size
        self.peak += layout.block_bytes * lanes * _blocks(slots.peak, size)
        self.steady += layout.block_bytes * _blocks_of(lanes, slots.steady, size, slots.ragged)
        self.final += layout.block_bytes * _blocks_of(lanes, slots.final, size, slots.ragged)


@dataclass(kw_only=True)
class _Sums:
    """What is added up layer by layer."""

    kv: int = 0
    lent: int = 0
    read: int = 0
    moved: int = 0

    def hold(self, layout: BlockLayout | SideLayout, lanes: int, slots: int) -> None:
        """Add what is held at the prefill peak."""
        self.kv += lanes * layout.kv_bytes * _blocks(slots, layout.block_size)
        self.lent += lanes * layout.block_bytes * _blocks(slots, layout.block_size)


def footprint(plan: Plan, prompt: int, output: int, chunk: int) -> Footprint:
    """Return the bounds for one request on each tier; arguments as `Plan.footprint` takes them."""
    tiers = {Tier.DEVICE: _Bytes(), Tier.HOST: _Bytes()}
    sums = _Sums()
    staged = _Slots(peak=0, steady=0, final=0, read=0)
    for layer in plan.owned:
        store, lanes = layer.store, layer.shape.num_kv_heads
        slots = lasting = _slots(layer, prompt, output, chunk, plan.block_size)
        if store.old is not None:
            lasting, slots = _split(layer, plan.evicts, slots, chunk, plan.block_size)
            tiers[store.tier].add(store.old, lanes, lasting)
            sums.hold(store.old, lanes, lasting.peak)
            if store.side is not None:
                tiers[Tier.DEVICE].add(store.side, lanes, lasting)
                sums.hold(store.side, lanes, lasting.peak)
            sums.read += lanes * lasting.read * store.old.kv_bytes // plan.block_size
        tiers[store.own_tier].add(store.own, lanes, slots)
        sums.hold(store.own, lanes, slots.peak)
        if store.side is not None:
            tiers[Tier.DEVICE].add(store.side, lanes, slots)
            sums.hold(store.side, lanes, slots.peak)
        if store.records is not None:
            one = _Slots(peak=1, steady=1, final=1, read=0)
            tiers[Tier.DEVICE].add(store.records, lanes, one)
            sums.hold(store.records, lanes, 1)
        if store.tier is Tier.HOST:
            staged = _deeper(staged, _longest(layer, lasting, prompt, output), plan)
            sums.moved += _visits(plan, layer.index) * lanes * _fetched(layer, lasting, plan.block_size)
        sums.read += lanes * _read(layer, slots, plan.block_size)
    passing = replace(staged, steady=0, final=0) if plan.resident_tokens else staged
    for index in set(plan.cache.buffers.values()):
        buffer = plan.layers[index]
        tiers[Tier.DEVICE].add(buffer.store.lasting, buffer.shape.num_kv_heads, passing)
    for layer in plan.owned:
        if layer.store.resident:
            tiers[Tier.DEVICE].add(layer.store.lasting, layer.shape.num_kv_heads, replace(staged, peak=0))
    device, host = tiers[Tier.DEVICE], tiers[Tier.HOST]
    return Footprint(
        prefill_peak_bytes=device.peak,
        steady_bytes=device.steady,
        final_bytes=device.final,
        read_bytes_per_step=sums.read,
        sidecar_fraction=1 - sums.kv / sums.lent if sums.lent else 0.0,
        host_bytes=max(host.peak, host.final),
        moved_bytes_per_step=sums.moved,
    )


def _slots(layer: LayerPlan, prompt: int, output: int, chunk: int, block_size: int) -> _Slots:
    """Return how many slots a lane has in use.

    Blocks that a sliding window has passed are freed whole, so up to one block more than the window is held.
    """
    total, limits, window = prompt + output, layer.limits(prompt), layer.shape.window
    kept = limits.after_prompt
    steady = prompt if kept is None else min(prompt, kept)
    held = steady + output if limits.high is None else min(total, limits.high)
    peak = min(prompt, kept + chunk) if kept is not None and layer.keep.streams else prompt
    read = held
    if window is not None:
        passed = window + block_size
        peak, steady, held = min(peak, passed + chunk), min(steady, passed), min(held, passed)
        read = min(read, window)
    return _Slots(peak=peak, steady=steady, final=held, read=read, ragged=layer.ragged)


def _split(layer: LayerPlan, evicts: bool, slots: _Slots, chunk: int, size: int) -> tuple[_Slots, _Slots]:
    """Return how many slots are packed, and how many stay in floating point.

    Old blocks are packed before the next tokens are stored, so a chunk waits in floating point until then. What will be
    evicted from is packed when the prompt is over, and packed blocks are then never less than half full, but for one.

    Args:
        layer: whose blocks these are.
        evicts: whether tokens are dropped in any layer: then nothing is packed before the prompt is over.
        slots: of both.
        chunk: most prompt tokens of a step.
        size: slots per block.
    """
    residual = layer.store.residual
    newest = residual + size

    def full(slots: int) -> int:
        return max(0, slots - residual) // size * size

    read = full(slots.read)
    if not evicts:
        waiting = residual + size - 1 + chunk
        packed = _Slots(peak=full(slots.peak), steady=full(slots.steady), final=full(slots.final), read=read)
        loose = replace(
            slots, peak=min(slots.peak, waiting), steady=min(slots.steady, waiting), final=min(slots.final, newest),
            read=slots.read - read,
        )  # fmt: skip
        return packed, loose
    most = 0
    if layer.ragged:  # some lane may hold more than the residual where the average does not
        most = (slots.final // (size // 2 + 1) + 2) * size
    elif slots.final > residual:
        most = (slots.final // (size // 2 + 1) + 1) * size
    loose = replace(slots, final=min(slots.final, newest), read=slots.read - read)
    return _Slots(peak=0, steady=0, final=most, read=read), loose


def _longest(layer: LayerPlan, slots: _Slots, prompt: int, output: int) -> _Slots:
    """Return the slots of a layer's longest lane."""
    kept = layer.limits(prompt).after_prompt
    if not layer.ragged or layer.budget is None or kept is None:
        return slots
    most = min(prompt, layer.budget.most_of_lane(kept, layer.shape.num_kv_heads))
    return replace(slots, steady=most, final=most + slots.final - slots.steady)


def _deeper(staged: _Slots, slots: _Slots, plan: Plan) -> _Slots:
    """Return the slots of a staging lane: the past and the chunk in a prompt, later what one step reads and writes."""
    return _Slots(
        peak=max(staged.peak, slots.peak),
        steady=max(staged.steady, plan.visiting(slots.steady)),
        final=max(staged.final, plan.visiting(slots.final)),
        read=0,
    )


def _visits(plan: Plan, index: int) -> int:
    """Return how many layers read the lanes of one."""
    return 1 + sum(other.shares_kv_with == index for other in plan.shape.layers)


def _fetched(layer: LayerPlan, slots: _Slots, block_size: int) -> int:
    """Return the bytes of a lane on the host that one visit moves."""
    layout = layer.store.lasting
    if layer.attend is None:
        return layout.block_bytes * _blocks(slots.final, block_size)
    tokens = _tokens_read(layer, slots, block_size)
    if layer.attend.per is Per.BLOCK:
        return layout.block_bytes * _blocks(tokens, block_size)
    return tokens * layout.kv_bytes // block_size


def _tokens_read(layer: LayerPlan, slots: _Slots, block_size: int) -> int:
    """Return how many tokens of a lane a step reads, the new one included; packed ones left out."""
    if layer.attend is None:
        return slots.read
    most = layer.attend.most_read(slots.read, layer.shape.group, block_size)
    return min(slots.read, most + layer.attend.ahead)


def _read(layer: LayerPlan, slots: _Slots, block_size: int) -> int:
    """Return the bytes of a lane that a step reads, those that it chooses by included; packed ones left out."""
    store, tokens, by = layer.store, _tokens_read(layer, slots, block_size), 0
    if layer.attend is not None and store.side is not None and tokens < slots.read:
        by = _scored(layer.attend, store.side, slots.read)
    return by + tokens * store.own.kv_bytes // block_size


def _scored(attend: Attend, side: SideLayout, slots: int) -> int:
    """Return the bytes of a lane's streams that a step chooses by."""
    names = [need.name for need in attend.needs if isinstance(need, Derived)]
    return sum(-(-slots // side.every(name)) * side.num_bytes(name) // side.entries(name) for name in names)


def _blocks_of(lanes: int, slots: int, block_size: int, ragged: bool) -> int:
    """Return the most blocks of lanes that hold ``slots`` on average."""
    if ragged:
        return lanes * (slots + block_size - 1) // block_size
    return lanes * _blocks(slots, block_size)


def _blocks(slots: int, block_size: int) -> int:
    return -(-slots // block_size)
