"""Throughput per byte of cache: what the memory buys."""

from __future__ import annotations

from kvatlas.core.errors import ConfigError

GB = 10**9


def throughput_per_gb(tokens_per_s: float, num_bytes: float) -> float:
    """Return tokens per second and GB (10**9 bytes, not GiB).

    Args:
        tokens_per_s: decode throughput, over all sequences.
        num_bytes: the memory it took; say beside the result whether that is the cache or the whole process.
    """
    if num_bytes <= 0:
        raise ConfigError(f"throughput per GB needs memory above 0 bytes, got {num_bytes}")
    return tokens_per_s / (num_bytes / GB)
