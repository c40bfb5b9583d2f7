"""How long do users of a real request trace wait, and how many are served within their limits?

Requests arrive when the trace says, scaled; lengths are scaled too; equal prefix hashes are really equal tokens, so
the prefix cache can serve them. Tokens are random: this is about time and memory, never about answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvatlas.core.errors import CapacityError
from kvatlas.core.units import parse_bytes
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.load import Arrival, Observation, drive
from kvatlas.metrics.latency import Slo, goodput, output_throughput, request_throughput
from kvatlas.records.schema import Point, Sample
from kvatlas.workloads.excerpts import EXCERPT_NAMES, load_excerpt
from kvatlas.workloads.materialize import prompt_ids
from kvatlas.workloads.trace import Trace, read_trace, scale_trace


class TraceReplay(Experiment):
    """TTFT, TPOT, end-to-end latency and goodput on a request trace."""

    name = "trace_replay"
    question = "How long do users of a real request trace wait?"
    role = "speed"

    def check(self, settings: Settings) -> None:
        """Read the traces.

        Raises:
            TraceError: a file or a line of it cannot be read.
        """
        for trace in settings.traces:
            _load(trace)

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every trace under every strategy."""
        slo = Slo(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)
        for trace in settings.traces:
            for strategy in settings.strategies:
                yield self.point(
                    model,
                    strategy,
                    trace=trace,
                    requests=settings.trace_requests,
                    time_scale=settings.trace_time_scale,
                    length_scale=settings.trace_length_scale,
                    max_prompt_tokens=settings.trace_max_prompt_tokens,
                    kv_memory_bytes=parse_bytes(settings.kv_memory),
                    slo=str(slo),
                )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return the latencies of each request and the totals of the replay.

        Raises:
            CapacityError: a request of the trace could never fit.
        """
        engine = lab.engine("speed", int(point.params["kv_memory_bytes"]))
        trace = scale_trace(
            _load(str(point.params["trace"])),
            time_scale=float(point.params["time_scale"]),
            length_scale=float(point.params["length_scale"]),
            limit=int(point.params["requests"]),
            max_prompt_tokens=int(point.params["max_prompt_tokens"]),
        )
        vocabulary = engine.store.lanes.shape.vocab_size
        arrivals = [
            Arrival(
                at_s=request.arrival_s,
                prompt_ids=prompt_ids(request, vocabulary, lab.settings.seed),
                output_tokens=request.output_tokens,
            )
            for request in trace.requests
        ]
        seen = drive(engine, arrivals, point.strategy)
        if seen.refused:
            raise CapacityError(f"{len(seen.refused)} of {len(arrivals)} requests can never fit: {seen.refused[0]}")
        return _samples(seen, Slo(ttft_s=lab.settings.slo_ttft_s, tpot_s=lab.settings.slo_tpot_s))


def _load(name: str) -> Trace:
    return load_excerpt(name) if name in EXCERPT_NAMES else read_trace(name)


def _samples(seen: Observation, slo: Slo) -> list[Sample]:
    times = seen.times
    samples = []
    for index, request in enumerate(times):
        samples.append(Sample(metric="ttft", unit="s", value=request.ttft_s, index=index))
        samples.append(Sample(metric="e2e", unit="s", value=request.e2e_s, index=index))
        if request.tpot_s is not None:
            samples.append(Sample(metric="tpot", unit="s", value=request.tpot_s, index=index))
    cached = sum(request.adopted_tokens for request in seen.requests)
    totals = {
        ("goodput", "requests/s"): goodput(times, slo, seen.wall_s),
        ("request_throughput", "requests/s"): request_throughput(times, seen.wall_s),
        ("output_throughput", "tokens/s"): output_throughput(times, seen.wall_s),
        ("kv_peak", "bytes"): seen.peak_used_bytes,
        ("preemptions", "preemptions"): seen.preemptions,
        ("peak_running", "requests"): seen.peak_running,
        ("cached_prompt_tokens", "tokens"): cached,
    }
    return samples + [Sample(metric=metric, unit=unit, value=value) for (metric, unit), value in totals.items()]
