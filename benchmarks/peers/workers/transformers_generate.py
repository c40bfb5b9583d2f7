"""transformers' ``generate`` behind `protocol`: one batch, left-padded, here of prompts of one length."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Meter, Run, serve


class Watch:
    """Sees the growing batch after each step, as a stopping criterion that never stops."""

    def __init__(self, meter: Meter, prompt_tokens: int) -> None:
        self._meter, self._seen = meter, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for sequence, tokens in enumerate(input_ids[:, self._seen :].tolist()):
            self._meter.add(sequence, tokens)
        self._seen = input_ids.shape[1]
        self._meter.step()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(settings: dict[str, Any]) -> tuple[str, Run]:
    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, trust_remote_code=False
    ).eval()
    model.set_attn_implementation("sdpa")

    def run(prompts: list[list[int]], meter: Meter) -> None:
        ids = torch.tensor(prompts)
        watch = transformers.StoppingCriteriaList([Watch(meter, ids.shape[1])])
        length = {"max_new_tokens": meter.steps + 1, "min_new_tokens": meter.steps + 1}
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, stopping_criteria=watch,
                **length,
            )  # fmt: skip

    return f"transformers {transformers.__version__} generate", run


if __name__ == "__main__":
    serve(load)
