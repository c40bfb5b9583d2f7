import sys
from importlib.metadata import version

import pytest
from tests.unit.cli.running import kvatlas

from kvatlas.cli import info


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_it_names_versions_devices_memory_kernels_and_the_bundled_model():
    result = kvatlas("info")
    assert (result.status, result.err) == (0, "")
    for text in ("kvatlas", version("torch"), "cpu", "available of", "cuda", "torch forms", "parameters"):
        assert text in result.out


def test_it_says_why_the_references_run(monkeypatch):
    monkeypatch.setenv("KVATLAS_KERNELS", "reference")
    assert "because KVATLAS_KERNELS=reference" in kvatlas("info").out


def test_what_is_missing_is_a_line_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("KVATLAS_KERNELS", "fast")
    monkeypatch.setattr(info, "files", lambda package: tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = kvatlas("info")
    assert (result.status, result.err) == (0, "")
    for text in ("unknown KVATLAS_KERNELS 'fast'", "missing or incomplete", "torch cannot be imported"):
        assert text in result.out
