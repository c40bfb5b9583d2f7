"""The native CPU kernels: finds the shared library, picks the instruction set, and calls C functions.

The library is plain C++ behind a C ABI and is loaded with ctypes: a call costs about ten microseconds, and neither
torch's nor Python's ABI is involved. Threads are given with each call: those that torch uses.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from kvatlas.core.errors import ConfigError

ABI_VERSION = 9
_FILE = "kvatlas/kernels/libkvatlas_native.so"
_ERRORS = {-1: "a format that it does not know", -2: "shapes that it does not cover", -3: "too little memory"}


@dataclass(frozen=True, eq=False)  # its hash is asked for with every call
class Library:
    """The loaded library.

    Args:
        path: where it lies.
        isa: the instruction set in use.
        available: all that this processor could use, best first.
    """

    path: Path
    isa: str
    available: tuple[str, ...]
    handle: ctypes.CDLL

    def function(self, name: str) -> Callable[..., int]:
        """Return a kernel in the instruction set in use."""
        function = getattr(self.handle, f"{name}_{self.isa}")
        function.restype = ctypes.c_int
        return function  # type: ignore[no-any-return]  # ctypes' attributes are untyped


@dataclass(frozen=True)
class Missing:
    """Why there is no library."""

    reason: str


@cache
def library() -> Library | Missing:
    """Return the native kernels of this machine, or why there are none; looked for once.

    ``KVATLAS_NATIVE`` names another library, or ``off``; ``KVATLAS_ISA`` another instruction set.

    Raises:
        ConfigError: one of the two names something that is not there.
    """
    wanted = os.environ.get("KVATLAS_NATIVE", "")
    if wanted == "off":
        return Missing("KVATLAS_NATIVE=off")
    path = Path(wanted) if wanted else _installed()
    if path is None or not path.exists():
        if wanted:
            raise ConfigError(f"KVATLAS_NATIVE={wanted} does not exist; name a libkvatlas_native.so, or 'off'")
        return Missing(
            "they were not built: no C++ compiler was found when kvatlas was installed; install g++ and reinstall"
        )
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return Missing(f"{path} cannot be loaded: {error}")
    version = getattr(handle, "kva_abi_version", None)
    if version is None or version() != ABI_VERSION:
        return Missing(f"{path} is not of this version of kvatlas; reinstall kvatlas")
    handle.kva_isas.restype = ctypes.c_char_p
    available = tuple(handle.kva_isas().decode().split())
    isa = os.environ.get("KVATLAS_ISA") or available[0]
    if isa not in available:
        raise ConfigError(f"KVATLAS_ISA={isa} does not run here; choose one of {', '.join(available)}")
    return Library(path, isa, available, handle)


def check(code: int, name: str) -> None:
    """Raise if a kernel refused its arguments: a bug of the caller, which asked for what it does not cover."""
    if code:
        raise RuntimeError(f"native kernel {name} met {_ERRORS.get(code, f'error {code}')}")


def num_threads() -> int:
    """Threads of a call: as many as torch would use."""
    return torch.get_num_threads()


def _installed() -> Path | None:
    """Return the installed library: beside this file in a wheel, in site-packages in an editable install."""
    beside = Path(__file__).with_name(Path(_FILE).name)
    if beside.exists():
        return beside
    for folder in map(Path, sys.path):
        if (folder / _FILE).exists():
            return folder / _FILE
    try:
        return Path(str(distribution("kvatlas").locate_file(_FILE)))
    except PackageNotFoundError:
        return None
