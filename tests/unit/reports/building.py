"""A small records file with all four experiments, made by hand so that who wins is known."""

import random

from kvatlas.records.schema import Point, RunManifest, Sample
from kvatlas.records.store import RecordStore

STRATEGIES = ("full", "h2o(heavy=0.1, recent=0.1)", "streaming_llm(sinks=4, recent=200)", "snapkv(budget=256)")
MIB = 1024**2
SLO = "TTFT <= 1000 ms, TPOT <= 100 ms"


def manifest(run_id="run", seed=0, **changes):
    values = {
        "started_at": "2026-11-21T02:15:00+00:00",
        "command": "kvatlas characterize --out out/records.duckdb <b>",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "commit_dirty": True,
        "versions": {"python": "3.11.2", "torch": "2.9.0+cpu", "platform": "Linux-6.1.0-x86_64-with-glibc2.36"},
        "hardware": {
            "cpu_model": "AMD EPYC 9B14",
            "cpu_features": "avx2 fma avx512f",
            "usable_threads": 2,
            "memory_bytes": 16 * 1024**3,
            "device": "cpu",
        },
        "models": {
            "llama-160m-shape": {"num_parameters": 162_000_000, "dtype": "float32", "source": "random weights"},
            "bundled": {"num_parameters": 820_352, "dtype": "float32", "source": "bundled"},
        },
    }
    return RunManifest(run_id=run_id, seed=seed, **(values | changes))


def point(experiment, strategy, role="speed", **params):
    model = "bundled" if role == "quality" else "llama-160m-shape"
    return Point(experiment=experiment, model=model, model_role=role, strategy=strategy, params=params)


def repeats(metric, unit, values, provenance="measured"):
    return [
        Sample(metric=metric, unit=unit, value=value, index=index, provenance=provenance)
        for index, value in enumerate(values)
    ]


def fill(store, prompts=(512, 1024, 2048, 4096), requests=(1, 2, 4, 8), contexts=(512, 1024, 2048), num_prompts=60):
    """Write all four experiments; the full cache is fastest and remembers all, the others save memory."""
    rng = random.Random(0)
    store.begin_run(manifest())
    for place, strategy in enumerate(STRATEGIES):
        for prompt in prompts:
            _prompt_length(store, rng, strategy, place, prompt)
        for asked in requests:
            _concurrency(store, rng, strategy, place, asked)
        _trace(store, rng, strategy, place)
    for context in contexts:
        _early_fact(store, rng, context, num_prompts)
    refused = point("concurrency", "kivi(bits=2)", concurrency=8, prompt_tokens=512, output_tokens=64)
    store.write_point(refused, status="refused", reason="group 32 > block size 16; raise block_size")
    failed = point("prompt_length", "snapkv(budget=256)", prompt_tokens=8192)
    store.write_point(failed, status="failed", reason="CapacityError: 8,192 tokens <need> 3 GiB; pass --kv-memory 4GiB")


def _prompt_length(store, rng, strategy, place, prompt):
    base = prompt / 4000 * (1 + 0.25 * place)
    kept = prompt if place == 0 else min(prompt, 256 + 64 * place)
    samples = [
        *repeats("ttft", "s", [base * rng.uniform(0.95, 1.05) for _ in range(6)]),
        *repeats("prefill_cpu", "s", [base * 1.9 * rng.uniform(0.99, 1.01) for _ in range(6)]),
        *repeats("kv_peak", "bytes", [prompt * 18432.0] * 6),
        *repeats("kv_after_prefill", "bytes", [kept * 18432.0] * 6),
        *repeats("sidecars_after_prefill", "bytes", [0.0 if place in (0, 2) else kept * 96.0] * 6),
        *repeats("outside_pool_peak", "bytes", [40 * MIB + prompt * 900.0] * 6, "estimated"),
    ]
    store.write_point(point("prompt_length", strategy, prompt_tokens=prompt), samples)


def _concurrency(store, rng, strategy, place, asked):
    rate = 40 * asked**0.6 * (1 - 0.05 * place)
    live = asked * MIB * (12 if place == 0 else 4 + place)
    running = min(asked, 64 * MIB // (live // asked))
    samples = [
        *repeats("output_throughput", "tokens/s", [rate * rng.uniform(0.9, 1.1) for _ in range(6)]),
        *repeats("output_throughput_cpu", "tokens/CPU-s", [rate / 1.9 * rng.uniform(0.98, 1.02) for _ in range(6)]),
        *repeats("kv_peak", "bytes", [float(min(live, 64 * MIB))] * 6),
        *repeats("peak_running", "requests", [float(running)] * 6),
        *repeats("preemptions", "", [float(asked - running)] * 6),
    ]
    settings = {"prompt_tokens": 512, "output_tokens": 64, "kv_memory_bytes": 64 * MIB}
    store.write_point(point("concurrency", strategy, concurrency=asked, **settings), samples)


def _early_fact(store, rng, context, num_prompts):
    shares = {"full": 0.95, "h2o": 0.9, "streaming_llm": 0.1, "snapkv": 0.95}
    for budget in (0.1, 0.2, 0.4):
        for name, share in shares.items():
            if name == "full" and budget != 0.1:
                continue
            kept = int(context * (1 if name == "full" else budget))
            sentence = name if name == "full" else f"{name}(size={kept})"
            lost = 0 if name == "full" else (0.5 - budget) * context / 2048
            correct = [float(rng.random() < share - (lost if name == "h2o" else 0)) for _ in range(num_prompts)]
            params = {"context_tokens": context, "budget": 1.0 if name == "full" else budget, "num_keys": 4}
            samples = repeats("correct", "", correct) + repeats("kv_after_prefill", "bytes", [kept * 512.0])
            store.write_point(point("early_fact", sentence, "quality", n=num_prompts, **params), samples)


def _trace(store, rng, strategy, place):
    ttft = [rng.lognormvariate(-1 + 0.1 * place, 0.8) for _ in range(80)]
    tpot = [rng.lognormvariate(-3.2 + 0.15 * place, 0.3) for _ in range(80)]
    totals = {"goodput": ("requests/s", 1.4 - 0.1 * place), "request_throughput": ("requests/s", 1.8)}
    totals |= {"output_throughput": ("tokens/s", 95.0 - 3 * place), "kv_peak": ("bytes", (60 - 12 * place) * MIB)}
    samples = [
        *repeats("ttft", "s", ttft),
        *repeats("tpot", "s", tpot),
        *repeats("e2e", "s", [a + 64 * b for a, b in zip(ttft, tpot, strict=True)]),
        *(Sample(metric=metric, unit=unit, value=value) for metric, (unit, value) in totals.items()),
        Sample(metric="preemptions", unit="", value=place),
        Sample(metric="peak_running", unit="requests", value=6 + place),
    ]
    settings = {"trace": "azure_code", "requests": 80, "time_scale": 0.5, "length_scale": 0.1}
    store.write_point(point("trace_replay", strategy, **settings, kv_memory_bytes=64 * MIB, slo=SLO), samples)


def small_file(path):
    """Write a small but whole records file; returns its path."""
    with RecordStore(path) as store:
        fill(store)
    return path
