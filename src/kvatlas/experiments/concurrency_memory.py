"""How does memory grow with the number of requests that arrive at once?

The study (arXiv:2604.05012, known here second-hand), 16 to 96 requests: vLLM about 72 GB throughout, since it takes its
pool at the start; H2O below 60 GB even at 96; InfiniGen about as much on the device and over 100 GB on the host.
Expected here, where bytes are those that requests hold: `full` grows with every request until the pool is full and
preempts from there on; strategies that cut the prompt grow slower; offloading moves the growth to the host. The limit
is memory capacity.
"""

from __future__ import annotations

from kvatlas.experiments.experiment import Lab
from kvatlas.experiments.load import Observation
from kvatlas.experiments.shared_load import SharedLoad
from kvatlas.records.schema import Point, Sample


class ConcurrencyMemory(SharedLoad):
    """Peak bytes on both tiers, requests at once, preemptions and swaps."""

    name = "concurrency_memory"
    question = "How does memory grow with the number of requests?"

    def samples(self, runs: list[Observation], point: Point, lab: Lab) -> list[Sample]:
        """Return the peaks and counts of each repeat."""
        return [
            Sample(metric=metric, unit=unit, value=value, index=repeat)
            for repeat, seen in enumerate(runs)
            for metric, unit, value in (
                ("device_peak", "bytes", seen.peak_used_bytes),
                ("host_peak", "bytes", seen.peak_host_bytes),
                ("peak_running", "requests", seen.peak_running),
                ("preemptions", "preemptions", seen.preemptions),
                ("swaps", "swaps", seen.swaps),
            )
        ]
