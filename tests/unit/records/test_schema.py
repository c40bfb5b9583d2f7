import numpy as np
import pytest
from pydantic import ValidationError

from kvatlas.records.schema import Point, RunManifest, Sample


def point(**changes):
    values = {"experiment": "ttft", "model": "tiny", "model_role": "speed", "strategy": "full"}
    return Point(**(values | {"params": {"prompt_tokens": 2048, "rate": 0.5}} | changes))


def test_a_key_depends_on_content_alone():
    assert point().key == point(params={"rate": 0.5, "prompt_tokens": 2048.0}).key
    assert point(params={"flag": True}).key == point(params={"flag": 1}).key


def test_a_key_is_stable_between_versions():
    assert point().key == "1a7a7ef43fc87641"


@pytest.mark.parametrize(
    "changes",
    [
        {"experiment": "itl"},
        {"model": "small"},
        {"model_role": "quality"},
        {"strategy": "snapkv"},
        {"params": {"prompt_tokens": 2048}},
        {"params": {"prompt_tokens": "2048", "rate": 0.5}},
    ],
)
def test_every_field_changes_the_key(changes):
    assert point(**changes).key != point().key


def test_numpy_numbers_become_plain_ones():
    params = point(params={"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True)}).params
    assert params == {"a": 3, "b": 0.5, "c": 1}
    assert [type(value) for value in params.values()] == [int, float, int]


@pytest.mark.parametrize(
    "changes", [{"params": {"x": float("nan")}}, {"params": {"x": [1]}}, {"strategy": ""}, {"x": 1}]
)
def test_a_point_refuses(changes):
    with pytest.raises(ValidationError):
        point(**changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "fast"])
def test_a_sample_is_a_finite_number(value):
    with pytest.raises(ValidationError):
        Sample(metric="ttft", unit="s", value=value)


def test_a_manifest_is_in_utc():
    facts = {
        "run_id": "r",
        "command": "c",
        "commit": None,
        "commit_dirty": None,
        "seed": 0,
        "versions": {},
        "hardware": {},
    }
    assert RunManifest(started_at="2026-11-21T02:15:00+00:00", **facts).models == {}
    for text in ("2026-11-21T02:15:00", "2026-11-21T02:15:00+01:00", "yesterday"):
        with pytest.raises(ValidationError):
            RunManifest(started_at=text, **facts)
