"""Manifests, points and samples for tests of reports."""

from kvatlas.records.schema import Point, RunManifest, Sample

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
