"""How do time and memory grow with the model?

The study (arXiv:2604.05012, known here second-hand) measured 8B, 20B and 70B models, but its figures for the larger two
could not be obtained. Expected here: weights outweigh the cache more and more, so what a strategy saves of a step
shrinks, while its share of the cache's bytes stays; the order of strategies should not turn. The limit is memory
bandwidth for the output and the arithmetic rate for the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvatlas.experiments.experiment import REPEATED, Experiment, Lab, Settings
from kvatlas.experiments.load import Arrival, drive, random_prompt
from kvatlas.experiments.provenance import marked
from kvatlas.metrics.latency import output_throughput
from kvatlas.models.loading import LoadedModel
from kvatlas.records.schema import Point, Sample


class ModelSize(Experiment):
    """Latency, throughput and memory of one batch, model by model."""

    name = "model_size"
    question = "How do time and memory grow with the model?"
    role = "speed"
    own = REPEATED | {"models", "model_prompt_tokens", "model_output_tokens", "model_batch"}

    def reads(self, settings: Settings) -> frozenset[str]:
        """Return what all of them read and its own, which stands in for the speed model."""
        return super().reads(settings) - {"speed_model"}

    def sources(self, settings: Settings) -> tuple[str | None, ...]:
        """Return the models of the settings, in their order."""
        return tuple(dict.fromkeys(settings.models))

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield the batch under every strategy."""
        for strategy in settings.strategies:
            yield self.point(
                model,
                strategy,
                prompt_tokens=settings.model_prompt_tokens,
                output_tokens=settings.model_output_tokens,
                batch=settings.model_batch,
            )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return TTFT and TPOT of each request, throughput and peak of each repeat, and the bytes of the weights.

        Raises:
            CapacityError: the batch, or the model, does not fit.
        """
        prompt_tokens, output_tokens, batch = (
            int(point.params[name]) for name in ("prompt_tokens", "output_tokens", "batch")
        )
        samples: list[Sample] = []
        moved = False
        for repeat in lab.repeats():
            engine = lab.engine(point)
            rng = random.Random(lab.settings.seed + repeat)
            vocabulary = engine.store.lanes.shape.vocab_size
            arrivals = [
                Arrival(
                    at_s=0.0,
                    prompt_ids=random_prompt(rng, vocabulary, prompt_tokens),
                    output_tokens=output_tokens,
                )
                for _ in range(batch)
            ]
            seen = drive(engine, arrivals, point.strategy)
            seen.want_all()
            moved |= seen.moved
            for number, times in enumerate(seen.times):
                assert times.tpot_s is not None
                index = repeat * batch + number
                samples.append(Sample(metric="ttft", unit="s", value=times.ttft_s, index=index))
                samples.append(Sample(metric="tpot", unit="s", value=times.tpot_s, index=index))
            throughput = output_throughput(seen.times, seen.wall_s)
            samples.append(Sample(metric="output_throughput", unit="tokens/s", value=throughput, index=repeat))
            samples.append(Sample(metric="device_peak", unit="bytes", value=seen.peak_used_bytes, index=repeat))
        samples.append(Sample(metric="weights_bytes", unit="bytes", value=weights_bytes(lab.model(point))))
        return marked(samples, point, lab.settings.link, moved=moved)


def weights_bytes(model: LoadedModel) -> int:
    """Return the bytes of a model's parameters, those that are shared counted once."""
    return sum(weight.numel() * weight.element_size() for weight in model.adapter.model.parameters())
