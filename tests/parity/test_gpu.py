"""The engine on a GPU gives what it gives on the CPU: all formats, eviction, host memory, a batch in chunks."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.driving import Job, drive, loaded, relative_error
from tests.families import tiny_model, token_ids

from kvatlas.engine.engine import Engine
from kvatlas.models.loading import LoadedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none"),
]
STRATEGIES = (
    "full",
    "h2o(heavy=20, recent=12)",
    "streaming_llm(sinks=4, recent=40)",
    "int8",
    "kivi(bits=4, residual=32)",
    "kivi(bits=2, residual=32)",
    "offload(to=host, prefetch=true)",
    "offload(to=host, prefetch=false)",
    "h2o(heavy=20, recent=12) | offload(host)",
    "snapkv(budget=40, window=8) | offload(host)",
    "kivi(bits=4, residual=32) | offload(host)",
    "quest(budget=32, dense=0)",
    "quest(budget=32, dense=0) | offload(host)",
    "rocket(budget=32, page=4)",
    "rocket(budget=32, page=4) | offload(host)",
    "snapkv(budget=40, window=8) | rocket(budget=32, page=4) | int8",
)


def logits(model: LoadedModel, strategy: str) -> list[torch.Tensor]:
    jobs = []
    for seed, length in enumerate((150, 33, 70)):
        tokens = token_ids(length + 12, seed=seed)[0].tolist()
        jobs.append(Job(tokens[:length], tokens[length:], strategy))
    engine = Engine(model, kv_memory="16MiB", host_memory="16MiB", max_batched_tokens=64, enable_prefix_caching=False)
    drive(engine, jobs)
    return [torch.stack(job.logits).cpu() for job in jobs]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gpu_agrees_with_the_cpu(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model("llama", num_hidden_layers=2, max_position_embeddings=512)
    here, there = loaded(plain), loaded(copy.deepcopy(plain).to("cuda"))
    # Rounding to few bits turns small differences of arithmetic into steps of a code.
    tolerance = 5e-2 if "kivi" in strategy or "int8" in strategy else 1e-3
    on_gpu = logits(there, strategy)
    monkeypatch.setenv("KVATLAS_KERNELS", "torch")  # native forms round queries over packed codes
    for got, want in zip(on_gpu, logits(here, strategy), strict=True):
        assert relative_error(got, want) < tolerance
