"""Whether a byte budget can be met by the memory there is."""

from __future__ import annotations

import psutil
import torch

from kvatlas.core.errors import CapacityError
from kvatlas.core.units import format_bytes


def check_host_memory(budget_bytes: int) -> None:
    """Raise CapacityError if the machine has less memory available than ``budget_bytes``."""
    available = psutil.virtual_memory().available
    if budget_bytes > available:
        raise CapacityError(
            f"host memory of {format_bytes(budget_bytes)} exceeds the {format_bytes(available)} available; "
            "lower --host-memory, or give 0 for none"
        )


def check_kv_memory(budget_bytes: int, device: torch.device) -> None:
    """Raise CapacityError if ``device`` has less memory available than ``budget_bytes``."""
    on_gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if budget_bytes > available:
        raise CapacityError(
            f"KV memory of {format_bytes(budget_bytes)} exceeds the {format_bytes(available)} available on {device}; "
            "lower --kv-memory"
        )
