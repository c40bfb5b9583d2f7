"""OpenVINO GenAI's ContinuousBatchingPipeline behind `protocol`, from the GGUF beside the model's folder.

Compute is float32: without the hint it would be bfloat16 where the processor has that. ``kv_precision`` is an option;
without it the pipeline chooses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from protocol import Meter, Run, serve


def load(settings: dict[str, Any]) -> tuple[str, Run]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = settings["kv_gib"]
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = settings["options"].get("max_batched_tokens", 2048)
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": settings["threads"]}
    if "kv_precision" in settings["options"]:
        properties["KV_CACHE_PRECISION"] = settings["options"]["kv_precision"]
    pipeline = openvino_genai.ContinuousBatchingPipeline(f"{settings['model']}.gguf", scheduler, "CPU", properties)
    numbers = iter(range(2**62))

    def run(prompts: list[list[int]], meter: Meter) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = meter.most_tokens(len(prompts[0]))
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        handles = [
            pipeline.add_request(next(numbers), ov.Tensor(np.array([prompt], dtype=np.int64)), config)
            for prompt in prompts
        ]
        while True:
            pipeline.step()
            for sequence, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        meter.add(sequence, output.generated_ids)
            if meter.step():
                break
        for handle in handles:
            handle.cancel()
        while pipeline.has_non_finished_requests():
            pipeline.step()

    return f"openvino-genai {openvino_genai.get_version().partition('-')[0]}", run


if __name__ == "__main__":
    serve(load)
