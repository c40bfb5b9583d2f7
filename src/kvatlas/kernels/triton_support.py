"""Whether the forms for GPUs can run, and what those in Triton need to launch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kvatlas.kernels.pool import TORCH_DTYPES, BlockPool

_OLDEST_CAPABILITY = (8, 0)
_INTERPRETED_PROCESSORS = 4


def interpreted() -> bool:
    """Whether Triton was asked to run its kernels in Python, on the CPU, as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_not(device: torch.device) -> str | None:
    """Return why the Triton forms cannot run on ``device``, or None if they can; looked at once per device.

    The device-independent layout of blocks is all they need, so what is asked for is a GPU that has asynchronous
    copies and bfloat16 (compute capability 8.0), and the package.
    """
    if device.type != "cuda":
        return f"Triton compiles for GPUs, not for {device.type}"
    if torch.version.hip is not None:
        return "the Triton forms are written for NVIDIA GPUs; on others nobody has run them"
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'kvatlas[gpu]'"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def why_not_flashinfer(device: torch.device) -> str | None:
    """Return why FlashInfer cannot run on ``device``, or None if it can."""
    if device.type != "cuda":
        return f"FlashInfer runs on CUDA devices, not on {device.type}"
    return None if find_spec("flashinfer") else "FlashInfer is not installed: pip install flashinfer-python"


@cache
def num_processors(device: torch.device) -> int:
    """Return how many multiprocessors ``device`` has."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least ``number`` and ``least``; tile widths have to be one."""
    return 1 << (max(number, least) - 1).bit_length()


def inner_contiguous(tensor: Tensor) -> Tensor:
    """Return ``tensor`` if neighbours in its last dimension are neighbours in memory, else such a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def typed_elements(pool: BlockPool) -> Tensor:
    """Return a pool's memory as elements of its format; as bytes where several elements share one."""
    return pool.memory if pool.layout.format.is_packed else pool.memory.view(TORCH_DTYPES[pool.layout.format])
