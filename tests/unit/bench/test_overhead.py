import pytest

from kvatlas.bench.overhead import COMPUTE, PARTS, measure_overhead
from kvatlas.bench.tables import overhead_table
from kvatlas.core.observer import NULL, current_observer
from kvatlas.engine.engine import Engine
from kvatlas.kernels import native
from kvatlas.models.loading import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("random:llama-mini")


@pytest.mark.parametrize("strategy", ["full", "h2o(heavy=0.2, recent=0.2)"])
def test_the_parts_add_up_to_the_step(model, strategy):
    told = measure_overhead(model, batch=2, prompt_tokens=40, steps=1, strategy=strategy)
    assert set(told["parts_ms"]) == set(PARTS)
    for part in ("model", "attention", "schedule", "place", "evict", "sample", "other", "kernels"):
        assert told["parts_ms"][part] > 0, part
    assert 0 < told["overhead_share"] < 1
    assert sum(told["parts_ms"].values()) == pytest.approx(told["step_ms"])
    assert len(overhead_table([told]).rows) == 1


def test_native_calls_are_told_from_the_python_around_them(model):
    if not isinstance(native.library(), native.Library):
        pytest.skip(f"no native kernels: {native.library()}")
    parts = measure_overhead(model, batch=1, prompt_tokens=40, steps=2)["parts_ms"]
    assert parts["kernel calls"] > 0


def test_nobody_watches_afterwards_even_after_an_error(model):
    with pytest.raises(Exception, match="memory"):
        measure_overhead(model, batch=1, prompt_tokens=8, steps=1, kv_memory=1)
    measure_overhead(model, batch=1, prompt_tokens=8, steps=1)
    assert current_observer() is NULL and Engine(model, kv_memory="1MiB").observer is NULL


def test_compute_is_not_overhead():
    assert set(COMPUTE) == {"model", "kernels"}
