"""A model without its attention: native decoder layers beside transformers' own, with native and with torch's linears.

The ratio is over transformers' layers with torch's linears. Few rows are a decode step, many a chunk of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvatlas.bench.timing import take_turns
from kvatlas.models.adapter import Adapter
from kvatlas.models.attention import AttentionCall
from kvatlas.models.fast import LinearChoice
from kvatlas.models.random import random_model

TORCH = "transformers"
_NATIVE_LINEARS = "native linears"
_NATIVE_LAYERS = "native layers"


def measure_layers(model: str, rows: Sequence[int], threads: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per number of rows and form, as plain JSON values.

    Args:
        model: ``"random:llama-55m"`` or another of `kvatlas.models.random.SIZES`.
        rows: packed tokens of a forward.
        threads: what torch uses already.
        repeats: rounds.
    """
    adapters = {TORCH: _adapter(model, "off"), _NATIVE_LINEARS: _adapter(model), _NATIVE_LAYERS: _adapter(model)}
    adapters[_NATIVE_LINEARS].fast.layers.restore()
    told = []
    for count in rows:
        forms: dict[str, Callable[[], Tensor]] = {
            name: partial(_forward, adapter, count) for name, adapter in adapters.items()
        }
        timings = take_turns(forms, repeats)
        plain, expected = timings[TORCH], forms[TORCH]()
        told += [
            {
                "model": model,
                "rows": count,
                "threads": threads,
                "form": name,
                "wall_ms": timing.wall_s * 1e3,
                "cpu_ms": timing.cpu_s * 1e3,
                "over_torch": plain.wall_s / timing.wall_s,
                "over_torch_cpu": plain.cpu_s / timing.cpu_s,
                "difference": float((forms[name]() - expected).abs().max()),
            }
            for name, timing in timings.items()
        ]
    return told


def _adapter(model: str, linears: LinearChoice = "auto") -> Adapter:
    return random_model(model, linear_weights=linears).adapter


class _NoAttention:
    """Answers attention with the values, so that only the model around it takes time."""

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the values of each query head's KV head [1, T, Hq, Dv]."""
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], dim=2)


def _forward(adapter: Adapter, rows: int) -> Tensor:
    places = torch.arange(rows)
    return adapter.forward(places % adapter.shape.vocab_size, places, _NoAttention(), places[-1:])
