"""How does the time of a long output grow?

The study (arXiv:2604.05012, known here second-hand), 10K prompt tokens and up to 8192 of output: vLLM about one
minute, H2O about three, InfiniGen more than sixteen, since its fetches are not hidden by compute and never pay off.
Expected here: every token costs a pass over the weights and over what is cached, so `full` grows faster than linearly,
strategies that bound their cache linearly; H2O pays for keeping its sums at every step. The limit is memory bandwidth;
for offloading it is the link.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvatlas.experiments.experiment import REPEATED, Experiment, Lab, Settings
from kvatlas.experiments.load import Arrival, drive, random_prompt
from kvatlas.experiments.provenance import marked
from kvatlas.records.schema import Point, Sample


class OutputLength(Experiment):
    """Time from the first token to the last of one request, against output length."""

    name = "output_length"
    question = "How does the time of a long output grow?"
    role = "speed"
    own = REPEATED | {"output_tokens", "output_prompt_tokens"}

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every output length under every strategy, short ones first."""
        for output_tokens in sorted(settings.output_tokens):
            for strategy in settings.strategies:
                yield self.point(
                    model, strategy, output_tokens=output_tokens, prompt_tokens=settings.output_prompt_tokens
                )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return the decode time and TPOT of each repeat.

        Raises:
            CapacityError: prompt and output do not fit.
        """
        samples: list[Sample] = []
        for repeat in lab.repeats():
            engine = lab.engine(point)
            rng = random.Random(lab.settings.seed + repeat)
            vocabulary = engine.store.lanes.shape.vocab_size
            request = Arrival(
                at_s=0.0,
                prompt_ids=random_prompt(rng, vocabulary, int(point.params["prompt_tokens"])),
                output_tokens=int(point.params["output_tokens"]),
            )
            seen = drive(engine, [request], point.strategy)
            seen.want_all()
            (times,) = seen.times
            assert times.tpot_s is not None
            samples.append(Sample(metric="decode_time", unit="s", value=times.e2e_s - times.ttft_s, index=repeat))
            samples.append(Sample(metric="tpot", unit="s", value=times.tpot_s, index=repeat))
        return marked(samples, point, lab.settings.link)
