"""In which numbers a model computes: what was asked for, and on the CPU what is fastest there.

Nearly every checkpoint is bfloat16, and most processors have no products of bfloat16 numbers: there its own dtype is
several times slower than float32, whose products read weights kept in 16 bits (`kvatlas.models.fast`). Where a
processor has such products, a trial on two small layers decides.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal, get_args

import torch

from kvatlas.core.errors import ConfigError, UnsupportedError

DType = Literal["auto", "float32", "bfloat16", "float16"]

_ROWS = (256, 4, 1)  # of the trial's forwards: a prompt, a batch of decode steps, one
_ROUNDS = 5
_AHEAD = 0.9  # bfloat16 rounds, so it must win clearly
_DEVICES = "auto, cpu, cuda or cuda:<index>"


@dataclass(frozen=True, kw_only=True)
class CpuChoice:
    """What ``"auto"`` means on this machine's CPU.

    Args:
        dtype: ``torch.float32``, or ``torch.bfloat16`` for checkpoints that are bfloat16 themselves.
        why: in words.
    """

    dtype: torch.dtype
    why: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}: {self.why}"


def resolve_device(device: object) -> str:
    """Return where models shall run: ``"auto"`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ConfigError: it is no name.
    """
    if not isinstance(device, str | torch.device):
        raise ConfigError(f"unknown device {device!r}; choose {_DEVICES}")
    return str(device) if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: object, device: str | torch.device) -> torch.dtype | None:
    """Return the torch dtype to load, or None for the checkpoint's own.

    Raises:
        ConfigError: the name of the dtype or device is unknown.
        UnsupportedError: the device is absent, or computes this dtype wrongly or not at all.
    """
    if dtype not in get_args(DType):
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(get_args(DType))}")
    kind = _check_device(resolve_device(device))
    if dtype == "auto":
        return torch.float32 if kind == "cpu" and fastest_on_cpu().dtype is torch.float32 else None
    if dtype == "float16" and kind == "cpu":
        raise UnsupportedError("float16 on the CPU overflows above 65504 and gains no speed; use float32 or bfloat16")
    if dtype == "bfloat16" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise UnsupportedError(f"device {device!r} has no bfloat16; use float16 or float32")
    resolved: torch.dtype = getattr(torch, str(dtype))
    return resolved


@cache
def fastest_on_cpu() -> CpuChoice:
    """Return the dtype that checkpoints in bfloat16 compute in on this processor; tried once per process, if at all."""
    if not has_bfloat16_products():
        return CpuChoice(dtype=torch.float32, why="this processor has no bfloat16 products, float32 is faster")
    return by_trial(trial_s)


def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 numbers: AVX512_BF16, AMX or Arm's BF16."""
    if torch.backends.cpu.get_cpu_capability().startswith("SVE"):
        return True
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so perhaps gone in another torch
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def by_trial(seconds: Callable[[torch.dtype], list[float]]) -> CpuChoice:
    """Return the choice that the times of both forms give, the same forwards in the same order."""
    wide, narrow = seconds(torch.float32), seconds(torch.bfloat16)
    ratio = prod(a / b for a, b in zip(narrow, wide, strict=True)) ** (1 / len(wide))
    dtype = torch.bfloat16 if ratio < _AHEAD else torch.float32
    shown = ", ".join(f"{rows} tokens {a / b:.2f}" for rows, a, b in zip(_ROWS, narrow, wide, strict=True))
    return CpuChoice(dtype=dtype, why=f"in a trial bfloat16 took {ratio:.2f} of float32's time ({shown})")


def trial_s(dtype: torch.dtype) -> list[float]:
    """Return the best seconds of forwards over 256, 4 and 1 tokens of a random Llama of two layers."""
    from kvatlas.models.adapter import Adapter
    from kvatlas.models.dense_context import DenseContext, Segment
    from kvatlas.models.random import RandomSize, build_random  # it asks this module for its dtype

    size = RandomSize(layers=2, hidden=512, intermediate=1536, query_heads=8, kv_heads=2, head_dim=64, vocab=256)
    adapter = Adapter(build_random(size).to(dtype))
    best: list[float] = []
    for rows in _ROWS:
        tokens = torch.arange(rows)
        times = []
        for _ in range(_ROUNDS):
            context = DenseContext()
            context.begin([Segment(sequence=0, start=0, num_tokens=rows)])
            start = time.perf_counter()
            adapter.forward(tokens, tokens, context, tokens[-1:])
            times.append(time.perf_counter() - start)
        best.append(min(times))
    return best


def _check_device(device: str) -> str:
    """Return the kind of a device that is there."""
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"unknown device {device!r}; choose {_DEVICES}")
    kind, index = match[1], int(match[2] or 0)
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r} was asked for, but torch finds no CUDA device; use cpu")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise UnsupportedError(f"device {device!r} does not exist; torch finds {torch.cuda.device_count()}")
    return kind
