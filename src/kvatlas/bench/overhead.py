"""How much of a decode step is ours to blame: scheduling, strategies and Python around the model and its kernels.

An observer is a clock while a batch decodes; each span counts its own time, that of spans inside it left out, so the
parts of a step add up to the step. The parts:

- ``model``: the model's own forward, attention left out: embeddings, norms, linears (ours included), head.
- ``kernels``: native calls, and whole operations on blocks where no native call was made in them (torch's forms).
- ``kernel calls``: Python around native calls: checks, pointers, allocation of results.
- ``attention``: what our attention function does beside calling kernels: finding blocks and tables, layer by layer,
  choosing what to read, ordering moves and waiting for them.
- ``schedule``: choosing the batch and reserving its blocks.
- ``place``: taking slots and building tables for the batch.
- ``evict``: what strategies do after the step.
- ``sample``: from logits to token ids.
- ``other``: packing the batch, noting tokens, and all else inside a step.

Overhead is everything but ``model`` and ``kernels``. A span costs about a microsecond, which counts as overhead.
Medians over steps; wall time, since one thread computes.
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import AbstractContextManager
from typing import Any

from kvatlas.core.observer import Observer, SpanKind
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import LoadedModel

COMPUTE = ("model", "kernels")
PARTS = (*COMPUTE, "kernel calls", "attention", "schedule", "place", "evict", "sample", "other")
_PARTS = {
    SpanKind.MODEL: "model",
    SpanKind.KERNEL: "kernels",
    SpanKind.NATIVE: "kernels",
    SpanKind.ATTEND: "attention",
    SpanKind.SELECT: "attention",
    SpanKind.STAGING: "attention",
    SpanKind.WAIT: "attention",
    SpanKind.SCHEDULE: "schedule",
    SpanKind.PLACE: "place",
    SpanKind.EVICT: "evict",
    SpanKind.SAMPLE: "sample",
    SpanKind.FORWARD: "other",
}
_WARM_STEPS = 4


class _Clock(Observer):
    """Nested spans; each counts its own time.

    Attributes:
        spent: seconds by part since the step began.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.open: list[_Span] = []

    def span(self, kind: SpanKind, layer: int = -1, name: str = "") -> _Span:
        """Return a span that counts as a part of the step."""
        return _Span(self, _PARTS[kind], kind)

    def step(self, engine: Engine) -> dict[str, float]:
        """Run one step of an engine and return the seconds of its parts."""
        self.spent = {}
        with _Span(self, "other", None):
            engine.step()
        return self.spent


class _Span(AbstractContextManager[None, None]):
    """One clock, running while it is open."""

    __slots__ = ("_clock", "_kind", "_part", "_start", "inside", "native")

    def __init__(self, clock: _Clock, part: str, kind: SpanKind | None) -> None:
        self._clock, self._part, self._kind = clock, part, kind
        self.inside, self.native = 0.0, kind is SpanKind.NATIVE

    def __enter__(self) -> None:
        self._clock.open.append(self)
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self._start
        clock = self._clock
        clock.open.pop()
        part = "kernel calls" if self._kind is SpanKind.KERNEL and self.native else self._part
        clock.spent[part] = clock.spent.get(part, 0.0) + took - self.inside
        if clock.open:
            outer = clock.open[-1]
            outer.inside += took
            outer.native |= self.native


def measure_overhead(
    model: LoadedModel, *, batch: int, prompt_tokens: int, steps: int, strategy: str = "full", **engine_options: Any
) -> dict[str, Any]:
    """Return milliseconds of each part of a decode step, and the share that is overhead, as plain JSON values.

    Args:
        model: loaded; it is used by an engine of its own.
        batch: sequences that decode together.
        prompt_tokens: of each, processed before the clocks start.
        steps: decode steps that count.
        strategy: of all sequences.
        engine_options: of `kvatlas.engine.engine.Engine`.
    """
    clock = _Clock()
    engine = Engine(model, enable_prefix_caching=False, isolate_failures=False, observer=clock, **engine_options)
    rng, vocabulary = random.Random(0), model.adapter.shape.vocab_size
    params = SamplingParams(max_tokens=steps + _WARM_STEPS + 1 + batch, ignore_eos=True)
    for _ in range(batch):
        engine.add_request([rng.randrange(vocabulary) for _ in range(prompt_tokens)], params, strategy)
    while engine.scheduler.waiting or any(request.prefill_end is not None for request in engine.scheduler.running):
        engine.step()
    taken = [clock.step(engine) for _ in range(steps + _WARM_STEPS)][_WARM_STEPS:]
    parts = {part: statistics.median(step.get(part, 0.0) for step in taken) * 1e3 for part in PARTS}
    shares = [1 - sum(step.get(part, 0.0) for part in COMPUTE) / sum(step.values()) for step in taken]
    return {
        "model": model.name,
        "strategy": strategy,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "steps": steps,
        "step_ms": statistics.median(sum(step.values()) for step in taken) * 1e3,
        "parts_ms": parts,
        "overhead_share": statistics.median(shares),
    }
