"""Whatever a message shows, it stays one short line."""

from __future__ import annotations

import pytest

from kvatlas.core.messages import shown, told


@pytest.mark.parametrize("kind", ["text", "whole number", "list", "mapping", "object"])
def test_values(kind: str) -> None:
    value = {"text": "a\nb" * 999, "whole number": 10**9999, "list": [1] * 999, "mapping": {"a": {"b": "c" * 999}}}
    text = shown(value.get(kind, object()))
    assert len(text) < 200 and "\n" not in text


def test_errors() -> None:
    assert told(ValueError("first\n  second")) == "ValueError: first second"
    assert told(KeyError()) == "KeyError:"
    assert len(told(ValueError("x" * 999))) == 300
