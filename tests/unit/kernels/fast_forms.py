"""The fast forms of an operation that tests compare with its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from kvatlas.kernels.native import Missing, library

Form = Callable[..., Any]
FAST_FORMS = ["torch", "avx512, 1 thread", "avx2, 3 threads", "baseline, 2 threads"]


def fast_form(name: str, torch_path: ModuleType, native: ModuleType, operation: str, patch: pytest.MonkeyPatch) -> Form:
    """Return one of ``FAST_FORMS`` of an operation; skip the test where it does not run."""
    if name == "torch":
        return getattr(torch_path, operation)  # type: ignore[no-any-return]  # a module's attributes are untyped
    found = library()
    if isinstance(found, Missing):
        pytest.skip(f"no native kernels: {found.reason}")
    isa, threads = name.split(", ")
    if isa not in found.available:
        pytest.skip(f"this processor has no {isa}")
    kernel = replace(found, isa=isa).function(f"kva_{operation}")
    patch.setattr(native, "_kernel", lambda: kernel)
    patch.setattr(native, "num_threads", lambda: int(threads[0]))
    return getattr(native, operation)  # type: ignore[no-any-return]  # likewise
