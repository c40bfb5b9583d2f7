from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvatlas.core.errors import ConfigError
from kvatlas.kernels import dispatch
from kvatlas.kernels.dispatch import OPERATIONS, active_paths, choose
from kvatlas.kernels.native import Library, Missing

CPU, META = torch.device("cpu"), torch.device("meta")
THERE = Library(Path("somewhere.so"), "avx2", ("avx2", "baseline"), handle=None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KVATLAS_NATIVE", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch._has_library.cache_clear()
    yield
    dispatch._has_library.cache_clear()


def test_the_cpu_takes_the_native_form_of_operations_that_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "library", lambda: THERE)
    assert choose(CPU, native=True, triton=True) == "native"
    assert choose(CPU, triton=True) == "torch"
    assert choose(META, native=True) == "torch"
    paths = {each.operation: each for each in active_paths(CPU)}
    assert len(paths) == len(OPERATIONS)
    assert paths["decode attention"].path == "native" and paths["decode attention"].why == "avx2, somewhere.so"
    assert paths["chunk attention"].path == "native"


def test_without_the_library_torch_runs_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "library", lambda: Missing("no compiler"))
    with caplog.at_level(logging.WARNING, logger="kvatlas"):
        assert choose(CPU, native=True) == choose(CPU, native=True) == "torch"
    assert [record.message for record in caplog.records if "no compiler" in record.message] == caplog.messages
    assert len(caplog.messages) == 1


def test_who_switched_the_library_off_is_not_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVATLAS_NATIVE", "off")
    monkeypatch.setattr(dispatch, "library", lambda: Missing("KVATLAS_NATIVE=off"))
    assert choose(CPU, native=True) == "torch"
    assert not caplog.messages


@pytest.mark.parametrize("wanted", ["reference", "torch"])
def test_a_form_that_is_always_there(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVATLAS_KERNELS", wanted)
    assert choose(CPU, native=True) == choose(META, triton=True) == wanted
    assert all(each.path == wanted and f"KVATLAS_KERNELS={wanted}" in each.why for each in active_paths(CPU))


def test_a_form_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVATLAS_KERNELS", "native")
    monkeypatch.setattr(dispatch, "library", lambda: Missing("no compiler"))
    with pytest.raises(ConfigError, match="native cannot run here: no compiler"):
        choose(CPU, native=True)
    with pytest.raises(ConfigError, match="on the CPU, not on meta"):
        choose(META)
    monkeypatch.setenv("KVATLAS_KERNELS", "triton")
    with pytest.raises(ConfigError, match="triton cannot run here"):
        choose(CPU, triton=True)
    monkeypatch.setenv("KVATLAS_KERNELS", "fastest")
    with pytest.raises(ConfigError, match=r"fastest.*auto, reference, torch, native, triton"):
        choose(CPU)


def test_a_form_that_is_asked_for_leaves_the_others_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVATLAS_KERNELS", "native")
    monkeypatch.setattr(dispatch, "library", lambda: THERE)
    assert choose(CPU, native=True) == "native"
    assert choose(CPU) == "torch"
