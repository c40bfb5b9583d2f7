"""How much of a decode step is ours to blame: scheduling, strategies and Python around the model and its kernels.

Functions of the engine are wrapped in clocks while a batch decodes; each clock counts its own time, that of clocks
inside it left out, so the parts of a step add up to the step. The parts:

- ``model``: the model's own forward, attention left out: embeddings, norms, linears (ours included), head.
- ``kernels``: native calls, and whole kernel functions where no native call was made in them (torch's forms).
- ``kernel calls``: Python around native calls: checks, pointers, allocation of results.
- ``attention``: what our attention function does beside calling kernels: finding blocks and tables, layer by layer.
- ``schedule``: choosing the batch and reserving its blocks.
- ``place``: taking slots and building tables for the batch.
- ``evict``: what strategies do after the step.
- ``sample``: from logits to token ids.
- ``other``: packing the batch, noting tokens, and all else inside a step.

Overhead is everything but ``model`` and ``kernels``. A clock costs about half a microsecond, which counts as overhead.
Medians over steps; wall time, since one thread computes.
"""

from __future__ import annotations

import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from kvatlas.engine.engine import Engine
from kvatlas.engine.forward import ForwardPass
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.runner import Runner
from kvatlas.engine.scheduler import Scheduler
from kvatlas.kernels import native
from kvatlas.models.loading import LoadedModel

COMPUTE = ("model", "kernels")
PARTS = (*COMPUTE, "kernel calls", "attention", "schedule", "place", "evict", "sample", "other")
_WARM_STEPS = 4
_READERS = ("kvatlas.engine.", "kvatlas.storage.", "kvatlas.models.")


@dataclass
class _Clock:
    """Nested clocks; each counts its own time.

    Args:
        spent: seconds by part since the step began.
    """

    spent: dict[str, float] = field(default_factory=dict)
    _inside: list[float] = field(default_factory=list)  # seconds of the clocks inside, for each open clock
    _native: list[bool] = field(default_factory=list)  # whether a native call was made, for each open kernel

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock around it."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._count(part, time.perf_counter() - begin)

        return run

    def timed_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a kernel with a clock that asks afterwards whether a native call was made."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            self._native.append(False)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - begin
                self._count("kernel calls" if self._native.pop() else "kernels", took)

        return run

    def timed_native(self, function: Callable[..., int]) -> _TimedNative:
        """Return a native function with a clock that tells the kernels around it."""
        return _TimedNative(function, self.timed("kernels", function), self._native)

    def _count(self, part: str, took: float) -> None:
        self.spent[part] = self.spent.get(part, 0.0) + took - self._inside.pop()
        if self._inside:
            self._inside[-1] += took


class _TimedNative:
    """A function of a ctypes library in a clock; what is set on it, such as argtypes, is set on the function."""

    _function: Callable[..., int]
    _timed: Callable[..., int]
    _kernels: list[bool]

    def __init__(self, function: Callable[..., int], timed: Callable[..., int], kernels: list[bool]) -> None:
        self.__dict__.update(_function=function, _timed=timed, _kernels=kernels)

    def __call__(self, *args: Any) -> int:
        self._kernels[:] = [True] * len(self._kernels)
        return self._timed(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._function, name, value)


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
    with _clocks(clock, model):
        engine = Engine(model, enable_prefix_caching=False, isolate_failures=False, **engine_options)
        rng, vocabulary = random.Random(0), model.adapter.shape.vocab_size
        params = SamplingParams(max_tokens=steps + _WARM_STEPS + 1 + batch, ignore_eos=True)
        for _ in range(batch):
            engine.add_request([rng.randrange(vocabulary) for _ in range(prompt_tokens)], params, strategy)
        while engine.scheduler.waiting or any(request.prefill_end is not None for request in engine.scheduler.running):
            engine.step()
        taken = [_step(engine, clock) for _ in range(steps + _WARM_STEPS)][_WARM_STEPS:]
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


def _step(engine: Engine, clock: _Clock) -> dict[str, float]:
    clock.spent = {}
    clock.timed("other", engine.step)()
    return clock.spent


@contextmanager
def _clocks(clock: _Clock, model: LoadedModel) -> Iterator[None]:
    """Put clocks around functions until the block ends; engines made inside it have them."""
    undo: list[tuple[Any, str, Any]] = []

    def replace(holder: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        undo.append((holder, name, holder.__dict__.get(name)))
        setattr(holder, name, wrap(getattr(holder, name)))

    _forget_functions()
    try:
        replace(Scheduler, "next_batch", functools.partial(clock.timed, "schedule"))
        replace(Runner, "_place", functools.partial(clock.timed, "place"))
        replace(Runner, "_evict", functools.partial(clock.timed, "evict"))
        replace(ForwardPass, "attend", functools.partial(clock.timed, "attention"))
        replace(model.adapter.model, "forward", functools.partial(clock.timed, "model"))
        replace(sys.modules[Engine.__module__], "sample", functools.partial(clock.timed, "sample"))
        replace(native.Library, "function", lambda find: lambda self, name: clock.timed_native(find(self, name)))
        for name, module in list(sys.modules.items()):
            if name.startswith(_READERS):
                for each, found in list(vars(module).items()):
                    if isinstance(found, FunctionType) and found.__module__.startswith("kvatlas.kernels."):
                        replace(module, each, clock.timed_kernel)
        yield
    finally:
        for holder, name, original in reversed(undo):
            if original is None:
                delattr(holder, name)
            else:
                setattr(holder, name, original)
        _forget_functions()


def _forget_functions() -> None:
    """Let kernels look their native functions up again: some keep what they found, with our clock or without."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kvatlas.kernels."):
            for found in vars(module).values():
                if hasattr(found, "cache_clear"):
                    found.cache_clear()
