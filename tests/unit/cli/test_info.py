import sys
from importlib.metadata import version

import pytest
from tests.unit.cli.running import kvatlas

from kvatlas.cli import info
from kvatlas.kernels import dispatch
from kvatlas.kernels.native import Missing


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_it_names_versions_devices_memory_kernels_and_the_bundled_model():
    result = kvatlas("info")
    assert (result.status, result.err) == (0, "")
    for text in (
        "kvatlas",
        version("torch"),
        "cpu",
        "available of",
        "cuda",
        "kernels on cpu",
        "decode attention: ",
        "parameters",
    ):
        assert text in result.out


def test_it_says_why_the_references_run(monkeypatch):
    monkeypatch.setenv("KVATLAS_KERNELS", "reference")
    assert "because KVATLAS_KERNELS=reference" in kvatlas("info").out


def test_it_says_why_torch_runs_where_the_native_library_is_missing(monkeypatch):
    why = "no compiler"
    monkeypatch.delenv("KVATLAS_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "library", lambda: Missing(why))
    dispatch._has_library.cache_clear()
    try:
        assert f"decode attention: torch ({why})" in kvatlas("info").out
    finally:
        dispatch._has_library.cache_clear()


def test_a_form_that_cannot_run_is_a_line_not_an_error(monkeypatch):
    for choice, why in (("fast", "unknown KVATLAS_KERNELS 'fast'"), ("triton", "cannot run here")):
        monkeypatch.setenv("KVATLAS_KERNELS", choice)
        result = kvatlas("info")
        assert result.status == 0 and why in result.out


def test_what_is_missing_is_a_line_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(info, "files", lambda package: tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = kvatlas("info")
    assert (result.status, result.err) == (0, "")
    for text in ("kernels", "missing or incomplete", "torch cannot be imported"):
        assert text in result.out
