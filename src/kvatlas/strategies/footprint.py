"""One formula for the bytes of a request, used by admission, the tests and the commands. No torch."""

from __future__ import annotations

from kvatlas.core.footprint import Footprint
from kvatlas.core.layout import DEFAULT_BLOCK_SIZE, layout_of
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format, Moment
from kvatlas.strategies.strategy import Strategy


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
    """Return the bounds for one request on the device tier.

    Args:
        strategy: what the request runs under.
        shape: the model.
        prompt_tokens: tokens of the prompt.
        output_tokens: most tokens that may be generated.
        chunk_tokens: most prompt tokens that one step processes.
        format: the model's own format, used where the strategy names none.
        block_size: slots per block.
    """
    peak = steady = final = read = kv = 0
    for index in shape.owners:
        layer = shape.layers[index]
        layout = layout_of(layer, strategy.format or format, block_size, strategy.sidecars)
        lent = layer.num_kv_heads * layout.block_bytes
        slots = _slots(strategy, layer, prompt_tokens, output_tokens, chunk_tokens, block_size)
        peak_slots, steady_slots, final_slots, read_slots = slots
        peak += lent * _blocks(peak_slots, block_size)
        steady += lent * _blocks(steady_slots, block_size)
        final += lent * _blocks(final_slots, block_size)
        read += layer.num_kv_heads * read_slots * layout.kv_bytes // block_size
        kv += layer.num_kv_heads * layout.kv_bytes * _blocks(peak_slots, block_size)
    return Footprint(
        prefill_peak_bytes=peak,
        steady_bytes=steady,
        final_bytes=final,
        read_bytes_per_step=read,
        sidecar_fraction=1 - kv / peak if peak else 0.0,
    )


def _slots(
    strategy: Strategy, layer: LayerShape, prompt: int, output: int, chunk: int, block_size: int
) -> tuple[int, int, int, int]:
    """Return slots per lane: at the prefill peak, after the prompt, at the end, and read by the last step.

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
    return peak, steady, held, read


def _blocks(slots: int, block_size: int) -> int:
    return -(-slots // block_size)
