from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def fast_forms() -> Iterator[None]:
    """Tests compare the fast forms with the references, whatever the caller's environment asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVATLAS_KERNELS", raising=False)
        yield
