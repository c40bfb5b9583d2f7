"""How do throughput and KV memory grow with the number of requests, and how many run at once?

Expected: a strategy that bounds its cache runs more requests in the same memory and reads less per step; `full`
reaches the memory limit first and preempts or queues from there on. The limit is memory bandwidth.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvatlas.core.units import parse_bytes
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.load import Arrival, drive
from kvatlas.metrics.latency import output_throughput
from kvatlas.records.schema import Point, Sample


class Concurrency(Experiment):
    """Throughput and memory of requests that all arrive at once."""

    name = "concurrency"
    question = "How do throughput and KV memory grow with the number of requests?"
    role = "speed"

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every number of requests under every strategy."""
        for concurrency in settings.concurrency:
            for strategy in settings.strategies:
                yield self.point(
                    model,
                    strategy,
                    concurrency=concurrency,
                    prompt_tokens=settings.concurrency_prompt_tokens,
                    output_tokens=settings.concurrency_output_tokens,
                    kv_memory_bytes=parse_bytes(settings.kv_memory),
                )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return throughput and memory of each repeat."""
        wanted = ("concurrency", "prompt_tokens", "output_tokens", "kv_memory_bytes")
        params = {name: int(point.params[name]) for name in wanted}
        samples: list[Sample] = []
        for repeat in range(lab.settings.repeats):
            engine = lab.engine("speed", params["kv_memory_bytes"])
            rng = random.Random(lab.settings.seed + repeat)
            vocabulary = engine.store.lanes.shape.vocab_size
            arrivals = [
                Arrival(
                    at_s=0.0,
                    prompt_ids=[rng.randrange(vocabulary) for _ in range(params["prompt_tokens"])],
                    output_tokens=params["output_tokens"],
                )
                for _ in range(params["concurrency"])
            ]
            seen = drive(engine, arrivals, point.strategy)
            figures = {
                ("output_throughput", "tokens/s"): output_throughput(seen.times, seen.wall_s),
                ("output_throughput_cpu", "tokens/CPU-s"): output_throughput(seen.times, seen.cpu_s),
                ("kv_peak", "bytes"): seen.peak_used_bytes,
                ("peak_running", "requests"): seen.peak_running,
                ("preemptions", "preemptions"): seen.preemptions,
            }
            samples += [
                Sample(metric=metric, unit=unit, value=value, index=repeat) for (metric, unit), value in figures.items()
            ]
        return samples
