import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.metrics.memory import MemoryBreakdown, memory_saving, peak, throughput_per_gb


def breakdown(kv_bytes=500, **changes):
    parts = {
        "kv_bytes": kv_bytes,
        "sidecar_bytes": 100,
        "table_bytes": 20,
        "cached_bytes": 50,
        "pool_bytes": 1000,
    }
    return MemoryBreakdown(**(parts | changes))


def test_parts_add_up():
    memory = breakdown()
    assert (memory.used_bytes, memory.free_bytes, memory.total_bytes) == (620, 350, 1020)
    inside = memory.kv_bytes + memory.sidecar_bytes + memory.cached_bytes + memory.free_bytes
    assert inside == memory.pool_bytes
    assert memory.bytes_per_token(31) == 20


@pytest.mark.parametrize("changes", [{"kv_bytes": 900}, {"cached_bytes": -1}])
def test_parts_fit_the_pool(changes):
    with pytest.raises(ConfigError, match="fit its pool"):
        breakdown(**changes)


def test_the_peak_has_the_most_used_bytes():
    assert peak([breakdown(1), breakdown(3), breakdown(2)]).kv_bytes == 3
    with pytest.raises(ConfigError, match="at least once"):
        peak([])


def test_throughput_per_gb_is_decimal():
    assert throughput_per_gb(100.0, 2 * 10**9) == 50.0
    with pytest.raises(ConfigError):
        throughput_per_gb(100.0, 0)


def test_memory_saving():
    assert memory_saving(250, 1000) == 4.0
    with pytest.raises(ConfigError):
        memory_saving(0, 1000)
    with pytest.raises(ConfigError):
        breakdown().bytes_per_token(0)
