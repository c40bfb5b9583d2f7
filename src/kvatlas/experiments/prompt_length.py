"""How do time to first token and memory grow with the prompt?

The study (arXiv:2604.05012, known here second-hand): vLLM takes prompts to 128K tokens; H2O and InfiniGen, as
published, run out of memory at 10K to 12K, their score matrices being quadratic in length; with a linear-memory
attention InfiniGen reaches 128K too. Expected here: no such wall, since sums are accumulated tile by tile. TTFT grows
faster than linearly, attention being quadratic; H2O pays a second pass over the scores. After the prompt, `full` holds
all of it, the others their budget; H2O's peak is the whole prompt, StreamingLLM's is not; offloading holds it on the
host. A prompt that cannot fit is refused, with the reason. The limit is the machine's arithmetic rate, then memory
capacity.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.experiment import REPEATED, Experiment, Lab, Settings
from kvatlas.experiments.holdings import holdings
from kvatlas.experiments.load import random_prompt
from kvatlas.experiments.provenance import marked
from kvatlas.records.schema import Point, Sample


class PromptLength(Experiment):
    """TTFT and KV bytes of one request against prompt length."""

    name = "prompt_length"
    question = "How do time to first token and memory grow with the prompt?"
    role = "speed"
    own = REPEATED | {"prompt_tokens", "prompt_model"}

    def reads(self, settings: Settings) -> frozenset[str]:
        """Return what all of them read and its own; it may have a model of its own."""
        return super().reads(settings) - ({"speed_model"} if settings.prompt_model else frozenset())

    def sources(self, settings: Settings) -> tuple[str | None, ...]:
        """Return its own model where the settings name one."""
        return (settings.prompt_model or settings.speed_model,)

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every prompt length under every strategy, short ones first."""
        for prompt_tokens in sorted(settings.prompt_tokens):
            for strategy in settings.strategies:
                yield self.point(model, strategy, prompt_tokens=prompt_tokens)

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return TTFT, CPU time and bytes of each repeat.

        Raises:
            CapacityError: the prompt does not fit.
        """
        prompt_tokens = int(point.params["prompt_tokens"])
        samples: list[Sample] = []
        for repeat in lab.repeats():
            engine = lab.engine(point)
            rng = random.Random(lab.settings.seed + repeat)
            vocabulary = engine.store.lanes.shape.vocab_size
            prompt = random_prompt(rng, vocabulary, prompt_tokens)
            request = engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True), point.strategy)
            cpu = time.process_time()
            while not request.token_times_s:
                engine.step()
            assert request.seq is not None
            held = holdings(engine.store, request.seq)
            figures = {
                ("ttft", "s"): request.token_times_s[0] - request.arrival_s,
                ("prefill_cpu", "s"): time.process_time() - cpu,
                ("kv_peak", "bytes"): request.peak_bytes,
                ("host_peak", "bytes"): engine.peak_host_bytes,
                ("kv_after_prefill", "bytes"): held.device_kv + held.host_kv,
                ("sidecars_after_prefill", "bytes"): held.device_sidecars + held.host_sidecars,
            }
            samples += [
                Sample(metric=metric, unit=unit, value=value, index=repeat) for (metric, unit), value in figures.items()
            ]
            engine.cancel(request)
        return marked(samples, point, lab.settings.link)
