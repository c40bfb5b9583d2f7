"""The fast forms of an operation that tests compare with its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest

from kvatlas.kernels.native import Missing, library

Form = Callable[..., Any]
FAST_FORMS = ["torch", "avx512, 1 thread", "avx2, 3 threads", "baseline, 2 threads"]


@dataclass(frozen=True)
class NativeForm:
    """The native form of an operation in one instruction set, on a number of threads, whatever others are in use."""

    native: ModuleType
    operation: str
    kernel: Callable[..., int]
    threads: int

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.native, "_kernel", lambda: self.kernel)
            patch.setattr(self.native, "num_threads", lambda: self.threads)
            return getattr(self.native, self.operation)(*arguments, **options)


def fast_form(name: str, torch_path: ModuleType, native: ModuleType, operation: str) -> Form:
    """Return one of ``FAST_FORMS`` of an operation; skip the test where it does not run."""
    if name == "torch":
        return getattr(torch_path, operation)  # type: ignore[no-any-return]  # a module's attributes are untyped
    found = library()
    if isinstance(found, Missing):
        pytest.skip(f"no native kernels: {found.reason}")
    isa, threads = name.split(", ")
    if isa not in found.available:
        pytest.skip(f"this processor has no {isa}")
    return NativeForm(native, operation, replace(found, isa=isa).function(f"kva_{operation}"), int(threads[0]))


def running_forms(torch_path: ModuleType, native: ModuleType, operation: str) -> list[Form]:
    """Return those of ``FAST_FORMS`` that run here.

    A test that compares them all asks the reference once: it is slower than all of them together.
    """
    found = library()
    available = () if isinstance(found, Missing) else found.available
    names = [name for name in FAST_FORMS if name == "torch" or name.split(", ")[0] in available]
    return [fast_form(name, torch_path, native, operation) for name in names]
