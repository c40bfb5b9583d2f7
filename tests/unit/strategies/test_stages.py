"""What every stage refuses, from a sentence and from Python alike."""

from __future__ import annotations

import dataclasses

import pytest

from kvatlas.core.errors import ConfigError
from kvatlas.strategies.keep.full import Full
from kvatlas.strategies.registry import stages
from kvatlas.strategies.strategy import Strategy

FIELDS = [(kind, field.name) for kind in stages().values() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("value", [None, b"2", [1], 10**30, -(2**31), float("nan"), "\ud800", {}], ids=repr)
def test_no_parameter_takes_what_is_no_parameter(kind, name: str, value: object) -> None:
    if value is None and next(field.default for field in dataclasses.fields(kind) if field.name == name) is None:
        return  # it may be left out
    with pytest.raises(ConfigError, match=kind.name):
        kind(**{name: value})


@pytest.mark.parametrize(
    "layers", ["", "-", "-1", "3-2", "1-2-3", "1\n", "0x1", "٣", "9" * 5000, "9" * 5000 + "-", -1, True]
)
def test_layers_that_are_no_layers(layers: object) -> None:
    with pytest.raises(ConfigError, match="full: layers"):
        Full(layers=layers)


@pytest.mark.parametrize(
    ("layers", "covered"), [(None, range(9)), (0, [0]), ("5", [5]), ("0-1", [0, 1]), ("6-", [6, 7, 8]), ("2-2", [2])]
)
def test_layers_that_a_stage_is_for(layers: object, covered: object) -> None:
    stage = Full(layers=layers)
    assert [layer for layer in range(9) if stage.covers(layer)] == list(covered)
    assert Strategy.parse(str(stage)) == Strategy((stage,))


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_sentences_and_python_agree(kind, name: str) -> None:
    for value in (2, 0.5, True, "host", 10**30, -1):
        written = {True: "true"}.get(value, value) if isinstance(value, bool) else value
        outcomes = []
        for make in (
            lambda written=written: Strategy.parse(f"{kind.name}({name}={written})").stages,
            lambda value=value: Strategy((kind(**{name: value}),)).stages,
        ):
            try:
                outcomes.append(make())
            except ConfigError as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
