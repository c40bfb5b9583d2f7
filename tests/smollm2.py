"""SmolLM2 for tests: unpacked once per run, by whichever process comes first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def shared_cache(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let the processes of a test run share one cache folder while the block runs."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    before = os.environ["KVATLAS_CACHE"]
    os.environ["KVATLAS_CACHE"] = str(folder)
    try:
        yield folder
    finally:
        os.environ["KVATLAS_CACHE"] = before
