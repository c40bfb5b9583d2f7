"""One formula for the bytes of a request on each tier, used by admission, the tests and the commands. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas.core.footprint import Footprint
from kvatlas.core.layout import DEFAULT_BLOCK_SIZE, BlockLayout, layout_of, sketch_layout_of, staging_buffers
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format, Moment, Sidecar
from kvatlas.strategies.stage import Attend
from kvatlas.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Slots per lane: at the prefill peak, after the prompt, at the end, and read by the last step."""

    peak: int
    steady: int
    final: int
    read: int


@dataclass(kw_only=True)
class _Bytes:
    """Sums over lanes, by the same moments."""

    peak: int = 0
    steady: int = 0
    final: int = 0

    def add(self, layout: BlockLayout, lanes: int, slots: _Slots) -> None:
        """Add whole blocks of ``lanes`` lanes."""
        lent = lanes * layout.block_bytes
        self.peak += lent * _blocks(slots.peak, layout.block_size)
        self.steady += lent * _blocks(slots.steady, layout.block_size)
        self.final += lent * _blocks(slots.final, layout.block_size)


def footprint(
    strategy: Strategy,
    shape: ModelShape,
    *,
    prompt_tokens: int,
    output_tokens: int,
    chunk_tokens: int,
    format: Format,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Footprint:
    """Return the bounds for one request on each tier.

    Args:
        strategy: what the request runs under.
        shape: the model.
        prompt_tokens: tokens of the prompt.
        output_tokens: most tokens that may be generated.
        chunk_tokens: most prompt tokens that one step processes.
        format: the model's own format, used where the strategy names none.
        block_size: slots per block.
    """
    format, host_layers = strategy.stored(format), strategy.host_layers(shape)
    device, host = _Bytes(), _Bytes()
    read = moved = kv = lent = 0
    staged = _Slots(peak=0, steady=0, final=0, read=0)
    for index in shape.owners:
        layer = shape.layers[index]
        layout = layout_of(layer, format, block_size, strategy.sidecars)
        slots = _slots(strategy, layer, prompt_tokens, output_tokens, chunk_tokens, block_size)
        if strategy.packs(layer):
            assert strategy.packed is not None
            old = layout_of(layer, strategy.packed, block_size, strategy.sidecars)
            packed, slots = _split(strategy, slots, chunk_tokens, block_size)
            device.add(old, layer.num_kv_heads, packed)
            kv += layer.num_kv_heads * old.kv_bytes * _blocks(packed.peak, block_size)
            lent += layer.num_kv_heads * old.block_bytes * _blocks(packed.peak, block_size)
            read += layer.num_kv_heads * packed.read * old.kv_bytes // block_size
        (host if index in host_layers else device).add(layout, layer.num_kv_heads, slots)
        kv += layer.num_kv_heads * layout.kv_bytes * _blocks(slots.peak, block_size)
        lent += layer.num_kv_heads * layout.block_bytes * _blocks(slots.peak, block_size)
        read_slots = slots.read
        if index in host_layers:
            if strategy.attend is not None:
                read_slots = min(slots.read, strategy.attend.most_read(slots.read, layer.group) + 1)
            staged = _deeper(staged, slots, strategy.attend, shape.largest_group)
            visits = 1 + sum(other.shares_kv_with == index for other in shape.layers)
            whole = layout.block_bytes * _blocks(slots.final, block_size)
            fetched = whole if strategy.attend is None else read_slots * layout.kv_bytes // block_size
            moved += visits * layer.num_kv_heads * fetched
            if strategy.sketch_share:
                sketch = sketch_layout_of(layer, format, block_size, strategy.sketch_share)
                device.add(sketch, layer.num_kv_heads, slots)
                read += layer.num_kv_heads * slots.read * sketch.kv_bytes // block_size
        pages = strategy.pages(index, layer, block_size)
        if pages is not None and _blocks(slots.read, block_size) > pages:
            read += layer.num_kv_heads * _blocks(slots.read, block_size) * layout.sidecar_size(Sidecar.KEY_BOUNDS)
            read_slots = pages * block_size
        read += layer.num_kv_heads * read_slots * layout.kv_bytes // block_size
    for index in set(staging_buffers(shape, host_layers).values()):
        layer = shape.layers[index]
        device.add(layout_of(layer, format, block_size, strategy.sidecars), layer.num_kv_heads, staged)
    return Footprint(
        prefill_peak_bytes=device.peak,
        steady_bytes=device.steady,
        final_bytes=device.final,
        read_bytes_per_step=read,
        sidecar_fraction=1 - kv / lent if lent else 0.0,
        host_bytes=max(host.peak, host.final),
        moved_bytes_per_step=moved,
    )


def _deeper(staged: _Slots, slots: _Slots, attend: Attend | None, group: int) -> _Slots:
    """Return the slots of a staging lane: the past and the chunk in a prompt, later what one step reads and writes."""
    steady, final = (n if attend is None else attend.most_read(n, group) for n in (slots.steady, slots.final))
    return _Slots(
        peak=max(staged.peak, slots.peak),
        steady=max(staged.steady, steady + 1),
        final=max(staged.final, final + 1),
        read=0,
    )


def _slots(strategy: Strategy, layer: LayerShape, prompt: int, output: int, chunk: int, block_size: int) -> _Slots:
    """Return how many slots a lane of ``layer`` has in use.

    Blocks that a sliding window has passed are freed whole, so up to one block more than the window is held.
    """
    total = prompt + output
    capacity, kept = strategy.keep.capacity(prompt), strategy.keep.kept_of_prompt(prompt)
    steady = prompt if kept is None else min(prompt, kept)
    held = steady + output if capacity is None else min(total, capacity)
    peak = prompt
    if kept is not None and Moment.AFTER_CHUNK in strategy.moments:
        peak = min(prompt, kept + chunk)
    read = held
    if layer.window is not None:
        passed = layer.window + block_size
        peak, steady, held = min(peak, passed + chunk), min(steady, passed), min(held, passed)
        read = min(read, layer.window)
    return _Slots(peak=peak, steady=steady, final=held, read=read)


def _split(strategy: Strategy, slots: _Slots, chunk: int, block_size: int) -> tuple[_Slots, _Slots]:
    """Return how many slots are packed, and how many stay in floating point.

    Old blocks are packed before the next tokens are stored, so a chunk waits in floating point until then. What will be
    evicted from is packed when the prompt is over, and packed blocks are then never less than half full, but for one.
    """
    assert strategy.encode is not None
    residual = strategy.encode.residual
    newest = residual + block_size

    def full(slots: int) -> int:
        return max(0, slots - residual) // block_size * block_size

    if not strategy.evicts:
        waiting = residual + block_size - 1 + chunk
        packed = _Slots(
            peak=full(slots.peak), steady=full(slots.steady), final=full(slots.final), read=full(slots.read)
        )
        loose = _Slots(
            peak=min(slots.peak, waiting),
            steady=min(slots.steady, waiting),
            final=min(slots.final, newest),
            read=slots.read - packed.read,
        )
        return packed, loose
    most = 0 if slots.final <= residual else (slots.final // (block_size // 2 + 1) + 1) * block_size
    packed = _Slots(peak=0, steady=0, final=most, read=full(slots.read))
    return packed, _Slots(
        peak=slots.peak, steady=slots.steady, final=min(slots.final, newest), read=slots.read - packed.read
    )


def _blocks(slots: int, block_size: int) -> int:
    return -(-slots // block_size)
