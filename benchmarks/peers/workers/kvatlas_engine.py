"""Our engine behind `protocol`: strategy and linear weights are options."""

from __future__ import annotations

from typing import Any

import torch
from protocol import Meter, Run, serve

import kvatlas
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import load_model


def load(settings: dict[str, Any]) -> tuple[str, Run]:
    torch.set_num_threads(settings["threads"])
    options = dict(settings["options"])
    strategy = options.pop("strategy", "full")
    model_options = {name: options.pop(name) for name in ("linear_weights",) if name in options}
    model = load_model(settings["model"], dtype="float32", **model_options)
    engine = Engine(
        model, kv_memory=f"{settings['kv_gib']}GiB", enable_prefix_caching=False, isolate_failures=False, **options
    )

    def run(prompts: list[list[int]], meter: Meter) -> None:
        params = SamplingParams(max_tokens=meter.most_tokens(len(prompts[0])), ignore_eos=True)
        requests = [engine.add_request(prompt, params, strategy) for prompt in prompts]
        places = {request.id: place for place, request in enumerate(requests)}
        try:
            while True:
                for new in engine.step():
                    meter.add(places[new.request.id], [new.token_id])
                if meter.step():
                    return
        finally:
            for request in requests:
                engine.cancel(request)

    return f"kvatlas {kvatlas.__version__}", run


if __name__ == "__main__":
    serve(load)
