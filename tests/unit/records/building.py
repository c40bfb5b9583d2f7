"""Small manifests, points and samples, for the tests and the processes they start."""

from kvatlas.records.schema import Point, RunManifest, Sample


def manifest(run_id="run", seed=0, **changes):
    values = {
        "started_at": "2026-11-21T02:15:00+00:00",
        "command": "test",
        "commit": "abc",
        "commit_dirty": False,
        "versions": {"python": "3.11"},
        "hardware": {"cores": 2, "device": "cpu", "memory_bytes": 2**40, "link": None},
        "models": {"tiny": {"num_parameters": 7, "trained": True}},
    }
    return RunManifest(run_id=run_id, seed=seed, **(values | changes))


def point(number=0, **changes):
    values = {"experiment": "ttft", "model": "tiny", "model_role": "speed", "strategy": "full"}
    return Point(**(values | {"params": {"prompt_tokens": number}} | changes))


def samples(count=3, metric="ttft"):
    return [Sample(metric=metric, unit="s", value=index / 3, index=index) for index in range(count)]
