"""What this machine can do at best: bytes read per second and FLOP per second, and who it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from kvatlas.bench.timing import Timing
from kvatlas.core.errors import ConfigError
from kvatlas.records.manifest import collect_manifest

READ_BYTES = 320 * 2**20
"""Of one read: ten times a last-level cache of 32 MiB."""
_GEMM = 1024
_READ, _GEMM_NAME = "limit: read ", "limit: sgemm"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The machine's limits, measured in the same rounds as what is held against them.

    Args:
        read_bytes_per_s: the fastest of several plain reads of memory that no cache holds.
        read_by: which one that was.
        flop_per_s: of a float32 matrix product of 1024 x 1024 x 1024.
    """

    read_bytes_per_s: float
    read_by: str
    flop_per_s: float

    def told(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "read_bytes_per_s": self.read_bytes_per_s,
            "read_by": self.read_by,
            "flop_per_s": self.flop_per_s,
        }


def limit_forms(read_bytes: int = READ_BYTES) -> dict[str, Callable[[], object]]:
    """Return the forms to time beside others; `limits_of` finds their timings by name."""
    words = torch.ones(read_bytes // 4)
    longs = words.view(torch.int64)
    a, b, out = torch.ones(_GEMM, _GEMM), torch.ones(_GEMM, _GEMM), torch.empty(_GEMM, _GEMM)
    return {
        f"{_READ}sum of float32": words.sum,
        f"{_READ}sum of int64": longs.sum,
        f"{_READ}dot of float32": lambda: torch.dot(words, words),
        _GEMM_NAME: lambda: torch.mm(a, b, out=out),
    }


def limits_of(timings: Mapping[str, Timing], read_bytes: int = READ_BYTES) -> Limits:
    """Return what the rounds say of the machine."""
    reads = {name.removeprefix(_READ): timings[name].wall_s for name in timings if name.startswith(_READ)}
    fastest = min(reads, key=lambda name: reads[name])
    return Limits(
        read_bytes_per_s=read_bytes / reads[fastest],
        read_by=fastest,
        flop_per_s=2 * _GEMM**3 / timings[_GEMM_NAME].wall_s,
    )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch, and so our kernels, use this many threads until the block ends.

    Raises:
        ConfigError: it is below 1.
    """
    if threads < 1:
        raise ConfigError(f"threads={threads} is out of range; write at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_to_use() -> int:
    """Return half of the memory that is available now, bytes: a benchmark must not make the machine swap."""
    return int(psutil.virtual_memory().available // 2)


def told_machine(command: str) -> dict[str, Any]:
    """Return versions, hardware, commit and load of this moment, as plain JSON values."""
    manifest = collect_manifest(command, seed=0)
    return manifest.model_dump(mode="json") | {"load_average": list(psutil.getloadavg())}
