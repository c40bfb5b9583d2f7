"""What the three experiments on load have in common: requests that arrive at once, run once for all three."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from kvatlas.core.units import parse_bytes
from kvatlas.experiments.experiment import REPEATED, Experiment, Lab, Settings
from kvatlas.experiments.load import Observation
from kvatlas.experiments.provenance import marked
from kvatlas.records.schema import Point, Sample


class SharedLoad(Experiment):
    """A number of requests that arrive at once, under every strategy."""

    role = "speed"
    own = REPEATED | {"concurrency", "concurrency_prompt_tokens", "concurrency_output_tokens"}

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
        """Return what the runs showed; runs that another experiment has made serve again.

        Raises:
            CapacityError: a request could never fit.
        """
        runs = lab.load_runs(point)
        for run in runs:
            run.want_all()
        samples = self.samples(runs, point, lab)
        return marked(samples, point, lab.settings.link, moved=any(run.moved for run in runs))

    @abstractmethod
    def samples(self, runs: list[Observation], point: Point, lab: Lab) -> list[Sample]:
        """Return the samples of this experiment; ``runs`` has one entry per repeat."""
