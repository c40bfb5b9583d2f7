"""All stages by name. Loading it imports every stage file and no torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from kvatlas.core.errors import UnknownNameError
from kvatlas.core.names import unknown_name
from kvatlas.strategies.recipes import OTHER_NAMES, RECIPES
from kvatlas.strategies.stage import Stage, StageInfo

_STAGES: dict[str, type[Stage]] = {}
_AXIS_PACKAGES = ("keep", "encode", "place", "attend")

S = TypeVar("S", bound=type[Stage])


def register(name: str, info: StageInfo) -> Callable[[S], S]:
    """Return a class decorator that makes a stage known under ``name``."""

    def add(stage: S) -> S:
        if name in _STAGES:
            raise AssertionError(f"two stages are called {name!r}")
        stage.name, stage.info = name, info
        _STAGES[name] = stage
        return stage

    return add


@cache
def stages() -> dict[str, type[Stage]]:
    """Return all registered stages by name, sorted by axis and name."""
    for axis in _AXIS_PACKAGES:
        package = importlib.import_module(f"kvatlas.strategies.{axis}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_STAGES.items(), key=lambda item: (item[1].axis, item[0])))


def stage_class(name: str) -> type[Stage]:
    """Return the stage registered under ``name``.

    Raises:
        UnknownNameError: there is none; the closest stage or recipe is suggested.
    """
    known = stages()
    if name in known:
        return known[name]
    if name.lower() in OTHER_NAMES:
        raise UnknownNameError(f"unknown strategy {name!r}; write {OTHER_NAMES[name.lower()]!r}")
    raise unknown_name("strategy", name, {*known, *RECIPES})
