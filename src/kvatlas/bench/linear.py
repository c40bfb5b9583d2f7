"""Linear layers of few rows, as in a decode step, in every type of weights beside ``torch.nn.functional.linear``.

The ratio is over ``F.linear`` in float32. Weights are read from memory each time: a form walks over several layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvatlas.bench.paged import COLD_BYTES
from kvatlas.bench.timing import take_turns
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.small_linear import FORMATS, LinearWeights, encode, native, small_linear

TORCH = "F.linear fp32"
_TORCH_BF16 = "F.linear bf16"
_MOST_LAYERS = 64  # of weights so small that caches hold them in a model too


def measure_linear(
    rows: Sequence[int], inputs: int, outputs: int, threads: int, repeats: int, *, cold_bytes: int = COLD_BYTES
) -> list[dict[str, Any]]:
    """Return a row per number of rows and type of weights, as plain JSON values.

    Args:
        rows: of the input.
        inputs: columns of the input.
        outputs: columns of the output.
        threads: what torch uses already.
        repeats: rounds.
        cold_bytes: bytes of weights that a form walks over.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    makers = _makers(weight, cold_bytes)
    told = []
    for count in rows:
        x = torch.randn(count, inputs, generator=generator)
        forms = {name: _walk(calls, x) for name, (calls, _) in makers.items()}
        timings = take_turns(forms, repeats)
        plain = timings[TORCH]
        told += [
            {
                "rows": count,
                "inputs": inputs,
                "outputs": outputs,
                "threads": threads,
                "weights": name,
                "wall_ms": timing.wall_s * 1e3,
                "cpu_ms": timing.cpu_s * 1e3,
                "over_torch": plain.wall_s / timing.wall_s,
                "over_torch_cpu": plain.cpu_s / timing.cpu_s,
                "weight_bytes_per_s": makers[name][1] / timing.wall_s,
                "error": float((makers[name][0][0](x).float() - linear(x, weight)).abs().max()),
            }
            for name, timing in timings.items()
        ]
    return told


_Call = Callable[[Tensor], Tensor]


def _makers(weight: Tensor, cold_bytes: int) -> dict[str, tuple[list[_Call], int]]:
    """Return for each type of weights the layers to walk over, and the bytes of one."""
    found: dict[str, tuple[list[_Call], int]] = {}
    for name, dtype in ((TORCH, torch.float32), (_TORCH_BF16, torch.bfloat16)):
        stored = weight.to(dtype)
        calls: list[_Call] = [partial(_torch_linear, stored.clone()) for _ in _layers(stored.nbytes, cold_bytes)]
        found[name] = (calls, stored.nbytes)
    for format in FORMATS:
        kept = encode(weight, format)
        layers = (replace(kept, codes=kept.codes.clone()) for _ in _layers(kept.nbytes, cold_bytes))
        found[format.value] = ([_bound(layer) for layer in layers], kept.nbytes)
    return found


def _layers(layer_bytes: int, cold_bytes: int) -> range:
    return range(max(1, min(_MOST_LAYERS, -(-cold_bytes // layer_bytes))))


def _bound(weights: LinearWeights) -> _Call:
    """Return ours, as the model calls it."""
    if choose(weights.codes.device, native=True) == "native":
        return native.bind(weights, None)
    return lambda x: small_linear(x, weights)


def _torch_linear(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x.to(weight.dtype), weight)


def _walk(calls: Sequence[_Call], x: Tensor) -> Callable[[], object]:
    turns = cycle(calls)
    return lambda: next(turns)(x)
