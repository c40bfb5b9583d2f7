"""How long does a request take when many arrive at once?

The study (arXiv:2604.05012, known here second-hand): vLLM about 20 s, flat from 16 to 96 requests; H2O grows mildly,
its cache being kept in order at every step; InfiniGen takes up to 14 times vLLM at 96. Expected here: TTFT grows with
the number of prompts before one's own, TPOT with the bytes a step reads; both jump where memory runs out. The limit is
the arithmetic rate for TTFT and memory bandwidth for TPOT; for offloading it is the link.
"""

from __future__ import annotations

from kvatlas.experiments.experiment import Lab
from kvatlas.experiments.load import Observation
from kvatlas.experiments.shared_load import SharedLoad
from kvatlas.metrics.latency import RequestTimes
from kvatlas.records.schema import Point, Sample


class RequestLatency(SharedLoad):
    """TTFT, TPOT and end-to-end latency of each request."""

    name = "request_latency"
    question = "How long does a request take when many arrive at once?"

    def samples(self, runs: list[Observation], point: Point, lab: Lab) -> list[Sample]:
        """Return the latencies of each request; equal indices are equal prompts under every strategy."""
        concurrency = int(point.params["concurrency"])
        return [
            sample
            for repeat, seen in enumerate(runs)
            for number, times in enumerate(seen.times)
            for sample in latencies(times, repeat * concurrency + number)
        ]


def latencies(times: RequestTimes, index: int) -> list[Sample]:
    """Return TTFT, end-to-end latency and, where there is more than one token, TPOT of a request."""
    found = {"ttft": times.ttft_s, "e2e": times.e2e_s, "tpot": times.tpot_s}
    return [
        Sample(metric=metric, unit="s", value=value, index=index)
        for metric, value in found.items()
        if value is not None
    ]
