"""Bytes of the cache, broken down by what they hold, and the throughput they buy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from kvatlas.core.errors import ConfigError

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """Bytes allocated at one moment, on one tier.

    The pool holds keys and values, sidecars, cached blocks and free space; block tables lie outside it.

    Args:
        kv_bytes: blocks of keys and values that live sequences own, unused slots of a block included.
        sidecar_bytes: what strategies keep beside the blocks: scales, bounds, importance sums, positions.
        table_bytes: block tables and free lists.
        cached_bytes: blocks of the prefix cache that no live sequence uses.
        pool_bytes: capacity of the pool.

    Raises:
        ConfigError: a number is negative, or the parts exceed the pool.
    """

    kv_bytes: int
    sidecar_bytes: int
    table_bytes: int
    cached_bytes: int
    pool_bytes: int

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or self.free_bytes < 0:
            raise ConfigError(f"memory must be >= 0 and fit its pool, got {self!r}")

    @property
    def used_bytes(self) -> int:
        """Bytes that live sequences need: keys, values, sidecars and tables."""
        return self.kv_bytes + self.sidecar_bytes + self.table_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the pool that hold nothing."""
        return self.pool_bytes - self.kv_bytes - self.sidecar_bytes - self.cached_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes allocated from the system: the pool and the tables."""
        return self.pool_bytes + self.table_bytes

    def bytes_per_token(self, seen_tokens: int) -> float:
        """Return used bytes per token seen, all layers together; evicted tokens count as seen."""
        if seen_tokens < 1:
            raise ConfigError(f"bytes per token need at least one token, got {seen_tokens}")
        return self.used_bytes / seen_tokens


def peak(breakdowns: Iterable[MemoryBreakdown]) -> MemoryBreakdown:
    """Return the breakdown with the most used bytes; the first of equals."""
    found = max(breakdowns, key=lambda breakdown: breakdown.used_bytes, default=None)
    if found is None:
        raise ConfigError("the peak of no breakdowns is undefined; sample memory at least once")
    return found


def memory_saving(num_bytes: float, dense_bytes: float) -> float:
    """Return dense over actual bytes: 4.0 means a quarter of the memory."""
    if num_bytes <= 0 or dense_bytes <= 0:
        raise ConfigError(f"a memory saving needs sizes above 0 bytes, got {dense_bytes} / {num_bytes}")
    return dense_bytes / num_bytes


def throughput_per_gb(tokens_per_s: float, num_bytes: float) -> float:
    """Return tokens per second and GB (10**9 bytes, not GiB).

    Args:
        tokens_per_s: decode throughput, over all sequences.
        num_bytes: the memory it took; say beside the result whether that is the cache or the whole process.
    """
    if num_bytes <= 0:
        raise ConfigError(f"throughput per GB needs memory above 0 bytes, got {num_bytes}")
    return tokens_per_s / (num_bytes / GB)
