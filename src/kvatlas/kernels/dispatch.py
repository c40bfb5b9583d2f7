"""Which form of a kernel runs: the native one on the CPU, the Triton one on GPUs, torch's where these are not there.

Here, so that every operation obeys the same switch and a doubtful result can be checked against the
references without editing code: ``KVATLAS_KERNELS=reference kvatlas ...``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from kvatlas.core.errors import ConfigError
from kvatlas.kernels import triton_support
from kvatlas.kernels.native import Library, library

Path = Literal["reference", "torch", "native", "triton", "flashinfer"]
_CHOICES = ("auto", "reference", "torch", "native", "triton", "flashinfer")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Operation:
    """An operation and its forms beside reference and torch.

    Args:
        name: in words.
        native: whether it has a native form.
        triton: whether it has a Triton form.
        flashinfer: whether FlashInfer has it.
        why_torch: why torch's form is used where there is no other.
    """

    name: str
    native: bool
    triton: bool
    flashinfer: bool = False
    why_torch: str = ""


OPERATIONS = (
    Operation("decode attention", native=True, triton=True, flashinfer=True),
    Operation("encode and decode blocks", native=True, triton=True),
    Operation("small-batch linear", native=True, triton=False, why_torch="for the CPU only"),
    Operation("decoder layer", native=True, triton=False, why_torch="for the CPU only"),
    Operation("column sums", native=True, triton=True),
    Operation("products with entries", native=True, triton=False, why_torch="one gather and a product"),
    Operation("choose what is read", native=True, triton=False, why_torch="two sorts"),
    Operation("draw tokens", native=True, triton=False, why_torch="one sort of all rows"),
    Operation("chunk attention", native=True, triton=False, why_torch="no form of its own for GPUs yet"),
)


@dataclass(frozen=True)
class ActivePath:
    """Which form of an operation runs on a device, and why."""

    operation: str
    path: Path
    why: str


def choose(device: torch.device, *, native: bool = False, triton: bool = False, flashinfer: bool = False) -> Path:
    """Return the form to run for tensors on ``device``; looks at the environment at every call, so a test may switch.

    A form that is asked for and runs here is used by the operations that have it, for arguments that it covers; the
    others use torch's.

    Args:
        device: where the tensors lie.
        native: the operation has a native form, and it covers the arguments.
        triton: the operation has a Triton form; whether it covers the arguments is for the caller to ask.
        flashinfer: FlashInfer has the operation, likewise; only by name, as it waits for the device at every call.

    Raises:
        ConfigError: ``KVATLAS_KERNELS`` is unknown, or names a form that cannot run here.
    """
    wanted = _choice()
    if wanted == "flashinfer":
        _refuse(wanted, triton_support.why_not_flashinfer(device))
        if flashinfer:
            return wanted
        wanted = "auto"
    if wanted == "auto":
        if device.type == "cpu":
            return "native" if native and _has_library() else "torch"
        return "triton" if triton and triton_support.why_not(device) is None else "torch"
    if wanted == "native":
        _refuse(wanted, _why_not_native(device))
        return "native" if native else "torch"
    if wanted == "triton":
        _refuse(wanted, _why_not_triton(device))
        return "triton" if triton else "torch"
    return wanted


def use_reference() -> bool:
    """Whether the environment asks for the reference forms.

    Raises:
        ConfigError: ``KVATLAS_KERNELS`` is unknown.
    """
    return _choice() == "reference"


def active_paths(device: torch.device) -> Iterator[ActivePath]:
    """Yield for each operation the form that runs on ``device``.

    Raises:
        ConfigError: as :func:`choose`.
    """
    for each in OPERATIONS:
        path = choose(device, native=each.native, triton=each.triton, flashinfer=each.flashinfer)
        yield ActivePath(each.name, path, _reason(each, device, path))


def _choice() -> Path | Literal["auto"]:
    wanted = os.environ.get("KVATLAS_KERNELS", "auto")
    if wanted not in _CHOICES:
        raise ConfigError(f"unknown KVATLAS_KERNELS {wanted!r}; expected one of {', '.join(_CHOICES)}")
    return wanted  # type: ignore[return-value]  # it is one of the choices


def _reason(operation: Operation, device: torch.device, path: Path) -> str:
    if _choice() in ("reference", "torch"):
        return f"because KVATLAS_KERNELS={path}"
    if path == "native":
        found = library()
        assert isinstance(found, Library)
        return f"{found.isa}, {found.path}"
    if path == "flashinfer":
        return "because KVATLAS_KERNELS=flashinfer, for calls that it covers"
    if path == "triton":
        return "interpreted" if device.type == "cpu" else str(device)
    if device.type == "cpu" and operation.native:
        return _why_not_native(device) or operation.why_torch
    if device.type != "cpu" and operation.triton:
        return _why_not_triton(device) or operation.why_torch
    return operation.why_torch or "it has no other form for this device"


def _why_not_native(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"native kernels run on the CPU, not on {device.type}"
    found = library()
    return None if isinstance(found, Library) else found.reason


def _why_not_triton(device: torch.device) -> str | None:
    return None if triton_support.interpreted() else triton_support.why_not(device)


def _refuse(wanted: str, why: str | None) -> None:
    if why is not None:
        raise ConfigError(f"KVATLAS_KERNELS={wanted} cannot run here: {why}; leave it unset to use what can")


@cache
def _has_library() -> bool:
    """Whether the native library is there; says so once, loudly, if it is not."""
    found = library()
    if isinstance(found, Library):
        return True
    if os.environ.get("KVATLAS_NATIVE") != "off":
        logging.getLogger("kvatlas").warning(
            "no native kernels, so torch forms run on the CPU, several times slower: %s", found.reason
        )
    return False
