"""transformers' continuous batching behind `protocol`: the manager of ``generate_batch``, kept between requests."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Meter, Run, serve
from transformers import ContinuousBatchingConfig, GenerationConfig

PAGE_TOKENS = 256
STEP_TOKENS = 512
WAIT_S = 300


def load(settings: dict[str, Any]) -> tuple[str, Run]:
    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, trust_remote_code=False
    ).eval()
    model.set_attn_implementation("sdpa")
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=settings["kv_gib"] * 2**30 // (token_bytes * PAGE_TOKENS),
            max_batch_tokens=STEP_TOKENS,
            allow_block_sharing=False,
        ),
    )
    manager.start()

    def run(prompts: list[list[int]], meter: Meter) -> None:
        most = meter.most_tokens(len(prompts[0]))
        names = [
            manager.add_request(prompt, max_new_tokens=most, streaming=True, record_timestamps=False, eos_token_id=-1)
            for prompt in prompts
        ]
        places = {name: place for place, name in enumerate(names)}
        seen = [0] * len(prompts)
        while True:
            output = manager.get_result(timeout=WAIT_S)
            if output is None:
                raise RuntimeError(f"no token came within {WAIT_S} s, or the manager's thread has ended")
            if output.error:
                raise RuntimeError(output.error)
            place = places.get(output.request_id)
            if place is None:
                continue  # of a request that was cancelled
            meter.add(place, output.generated_tokens[seen[place] :])
            seen[place] = len(output.generated_tokens)
            if meter.step():
                break
        for name in names:
            manager.cancel_request(name)

    return f"transformers {transformers.__version__} continuous batching", run


if __name__ == "__main__":
    serve(load)
