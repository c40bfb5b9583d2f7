import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.metrics.memory import throughput_per_gb


def test_throughput_per_gb_is_decimal():
    assert throughput_per_gb(100.0, 2 * 10**9) == 50.0
    with pytest.raises(ConfigError):
        throughput_per_gb(100.0, 0)
