"""What of a machine decides a measured value: points name it, so that another machine measures them anew."""

from __future__ import annotations

import os

import torch

from kvatlas.records.manifest import processor_name
from kvatlas.records.schema import Params

_FORCED = {"KVATLAS_KERNELS": "kernels", "KVATLAS_ISA": "instruction_set", "KVATLAS_NATIVE": "native_library"}


def machine_params(device: str) -> Params:
    """Return what a point says of the machine it is measured on, beside the number of threads.

    Args:
        device: where models run, such as ``cpu`` or ``cuda:1``.
    """
    params: Params = {"processor": processor_name()}
    accelerator = accelerator_name(device)
    if accelerator is not None:
        params["accelerator"] = accelerator
    return params | {name: os.environ[variable] for variable, name in _FORCED.items() if os.environ.get(variable)}


def accelerator_name(device: str) -> str | None:
    """Return the name of the GPU behind ``device``, "unknown" if this machine has none such, or None for the CPU."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return None
    place = int(index) if index.isdecimal() else 0
    known = kind == "cuda" and torch.cuda.is_available() and place < torch.cuda.device_count()
    return torch.cuda.get_device_name(place) if known else "unknown"
