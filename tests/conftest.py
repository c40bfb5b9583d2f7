"""One thread per test process: two of them share two cores, and small tensors gain nothing from more.

What is calibrated for test models is kept in a folder of the run, not in the user's.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["KVATLAS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
