"""One thread per test process: two of them share two cores, and small tensors gain nothing from more.

What is calibrated for test models is kept in a folder of the run, not in the user's. Random schedules are the same in
every run of the fast tests; ``make check-slow`` searches on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from kvatlas.models import precision
from kvatlas.strategies import plugins, registry

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["KVATLAS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _no_trial_of_dtypes() -> Iterator[None]:
    """A trial that is timed beside other tests may choose anything; the tests of `precision` ask for it themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_bfloat16_products", lambda: False)
        yield


@pytest.fixture
def own_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers, and the files it names, are forgotten after it."""
    registry._load()
    known, modules = dict(registry._STAGES), set(sys.modules)
    monkeypatch.setenv(plugins.VARIABLE, "")
    yield
    registry._STAGES.clear()
    registry._STAGES.update(known)
    registry._forget_plans()
    for name in set(sys.modules) - modules:
        if name.endswith(".py"):  # files are modules called by their paths
            del sys.modules[name]
