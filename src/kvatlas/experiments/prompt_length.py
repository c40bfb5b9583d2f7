"""How do time to first token and KV memory grow with the prompt?

Expected: TTFT grows faster than linearly, attention being quadratic; H2O pays a second pass over the scores. After
the prompt, `full` holds all of it, the others their budget; H2O's peak is the whole prompt, StreamingLLM's is not.
The limit is the machine's arithmetic rate.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.records.schema import Point, Sample


class PromptLength(Experiment):
    """TTFT and KV bytes of one request against prompt length."""

    name = "prompt_length"
    question = "How do time to first token and KV memory grow with the prompt?"
    role = "speed"

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every prompt length under every strategy, short ones first."""
        for prompt_tokens in settings.prompt_tokens:
            for strategy in settings.strategies:
                yield self.point(model, strategy, prompt_tokens=prompt_tokens)

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return TTFT, CPU time and KV bytes of each repeat; a short request warms up."""
        prompt_tokens = int(point.params["prompt_tokens"])
        samples: list[Sample] = []
        for repeat in range(lab.settings.repeats):
            engine = lab.engine("speed")
            rng = random.Random(lab.settings.seed + repeat)
            vocabulary = engine.store.lanes.shape.vocab_size
            prompt = [rng.randrange(vocabulary) for _ in range(prompt_tokens)]
            engine.add_request(prompt[:8], SamplingParams(max_tokens=1), point.strategy)
            while engine.has_work:
                engine.step()
            request = engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True), point.strategy)
            cpu = time.process_time()
            while not request.token_times_s:
                engine.step()
            assert request.seq is not None
            kv_bytes, held = engine.store.kv_bytes(request.seq), engine.store.allocated_bytes(request.seq)
            samples += [
                Sample(metric="ttft", unit="s", value=request.token_times_s[0] - request.arrival_s, index=repeat),
                Sample(metric="prefill_cpu", unit="s", value=time.process_time() - cpu, index=repeat),
                Sample(metric="kv_peak", unit="bytes", value=request.peak_bytes, index=repeat),
                Sample(metric="kv_after_prefill", unit="bytes", value=kv_bytes, index=repeat),
                Sample(metric="sidecars_after_prefill", unit="bytes", value=held - kv_bytes, index=repeat),
            ]
            engine.cancel(request)
        return samples
