"""How long do users of a real request trace wait, and how many are served within their limits?

Requests arrive when the trace says, scaled; lengths are scaled too; equal prefix hashes are really equal tokens, so
the prefix cache can serve them. Tokens are random: this is about time and memory, never about answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvatlas.core.units import parse_bytes
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.load import drive
from kvatlas.experiments.provenance import marked
from kvatlas.experiments.traffic import latency_samples, load_samples, load_trace, trace_params, trace_traffic
from kvatlas.metrics.latency import Slo
from kvatlas.records.schema import Point, Sample


class TraceReplay(Experiment):
    """TTFT, TPOT, end-to-end latency and goodput on a request trace."""

    name = "trace_replay"
    question = "How long do users of a real request trace wait?"
    role = "speed"
    own = frozenset(
        {"traces", "trace_requests", "trace_time_scale", "trace_length_scale", "trace_max_prompt_tokens"}
        | {"slo_ttft_s", "slo_tpot_s"}
    )

    def check(self, settings: Settings) -> None:
        """Read the traces.

        Raises:
            TraceError: a file or a line of it cannot be read.
        """
        for trace in settings.traces:
            load_trace(trace, settings.trace_requests)

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every trace under every strategy."""
        slo = Slo(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)
        for trace in settings.traces:
            content = trace_params(trace)
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
                    **content,
                )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return the latencies of each request and the totals of the replay.

        Raises:
            CapacityError: a request of the trace could never fit.
        """
        settings = lab.settings
        engine = lab.engine(point, kv_memory=int(point.params["kv_memory_bytes"]))
        vocabulary = engine.store.lanes.shape.vocab_size
        seen = drive(engine, trace_traffic(point.params, vocabulary, settings.seed), point.strategy)
        seen.want_all()
        slo = Slo(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)
        samples = latency_samples(seen.times, seen.wall_s, slo) + load_samples(seen)
        return marked(samples, point, settings.link, moved=seen.moved, timed=True)
