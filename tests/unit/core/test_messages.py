"""Whatever a message shows, it stays one short line."""

from __future__ import annotations

import pytest

from kvatlas.core.messages import shown, told


@pytest.mark.parametrize("value", ["a\nb" * 999, 10**9999, list(range(999)), {"a": {"b": "c" * 999}}, object(), None])
def test_values(value: object) -> None:
    assert len(shown(value)) < 200 and "\n" not in shown(value)


def test_errors() -> None:
    assert told(ValueError("first\n  second")) == "ValueError: first second"
    assert told(KeyError()) == "KeyError:"
    assert len(told(ValueError("x" * 999))) == 300
