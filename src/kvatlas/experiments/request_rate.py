"""How long do users wait when requests arrive at a given rate, steadily or in bursts?

The study (arXiv:2604.05012, known here second-hand) promises request rates; no such figure of it could be obtained.
Expected here: TTFT is flat until the rate nears what the machine serves and then grows with every further request;
bursts move that point to lower rates. Strategies that let more requests run at once, or decode faster, move it to
higher ones. The limit is the machine's arithmetic rate for prompts, then memory capacity.

Latencies are kept per request, so that reports can show their percentiles. `trace_replay` asks the same of recorded
traces with their own lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvatlas.core.units import parse_bytes
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.load import drive
from kvatlas.experiments.provenance import marked
from kvatlas.experiments.traffic import check_arrivals, drawn_traffic, latency_samples, load_samples, trace_params
from kvatlas.metrics.latency import Slo
from kvatlas.records.schema import Point, Sample


class RequestRate(Experiment):
    """TTFT, TPOT, end-to-end latency and goodput against the request rate."""

    name = "request_rate"
    question = "How long do users wait when requests arrive at a given rate?"
    role = "speed"
    own = frozenset(
        {"arrivals", "rates", "rate_requests", "rate_prompt_tokens", "rate_output_tokens", "slo_ttft_s", "slo_tpot_s"}
    )

    def check(self, settings: Settings) -> None:
        """Read how requests arrive.

        Raises:
            ConfigError: neither a process nor a bundled trace has this name.
            TraceError: a trace cannot be read.
        """
        for arrivals in settings.arrivals:
            check_arrivals(arrivals)

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every rate and kind of arrivals under every strategy, slow ones first."""
        slo = Slo(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)
        content = {arrivals: trace_params(arrivals) for arrivals in settings.arrivals}
        for rate in sorted(settings.rates):
            for arrivals in settings.arrivals:
                for strategy in settings.strategies:
                    yield self.point(
                        model,
                        strategy,
                        rate=rate,
                        arrivals=arrivals,
                        requests=settings.rate_requests,
                        prompt_tokens=settings.rate_prompt_tokens,
                        output_tokens=settings.rate_output_tokens,
                        kv_memory_bytes=parse_bytes(settings.kv_memory),
                        slo=str(slo),
                        **content[arrivals],
                    )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return the latencies of each request and the totals of the run.

        Raises:
            CapacityError: a request could never fit.
        """
        settings = lab.settings
        engine = lab.engine(point, kv_memory=int(point.params["kv_memory_bytes"]))
        vocabulary = engine.store.lanes.shape.vocab_size
        seen = drive(engine, drawn_traffic(point.params, vocabulary, settings.seed), point.strategy)
        seen.want_all()
        slo = Slo(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)
        samples = latency_samples(seen.times, seen.wall_s, slo) + load_samples(seen)
        return marked(samples, point, settings.link, moved=seen.moved, timed=True)
