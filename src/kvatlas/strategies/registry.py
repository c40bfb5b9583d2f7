"""All stages by name: ours, those of installed packages and those of files. Loading them imports no torch of ours."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar

from kvatlas.core.errors import ConfigError, UnknownNameError
from kvatlas.core.names import unknown_name
from kvatlas.strategies.recipes import FORMER_NAMES, OTHER_NAMES, RECIPES
from kvatlas.strategies.stage import Stage, StageInfo

_STAGES: dict[str, type[Stage]] = {}
_OURS = "kvatlas.strategies"
_NAME = re.compile(r"[A-Za-z_][\w-]*")  # what the grammar of strategies reads

S = TypeVar("S", bound=type[Stage])


def register(
    name: str, info: StageInfo | None = None, *, summary: str = "", paper: str = "unpublished", **facts: Any
) -> Callable[[S], S]:
    """Return a decorator that makes a stage known under ``name``; it stands above ``@dataclass``.

    The same class registered again, as when its module is reloaded, takes its own place.

    Args:
        name: what sentences call it.
        info: facts about it, in place of all others.
        summary: one line for users.
        paper: where the method comes from.
        facts: other fields of `StageInfo`.

    Raises:
        ConfigError: the name cannot be read in a sentence or is taken, there are no facts or two kinds of them, or
            what is decorated is no stage, no dataclass yet, or has a parameter without a default.
    """
    if (info is None) != bool(summary) or (info is not None and facts):
        raise ConfigError(f"{name!r} wants summary='what it does to the cache', or a StageInfo instead of all facts")
    known = StageInfo(summary=summary, paper=paper, **facts) if info is None else info

    def add(stage: S) -> S:
        _check(name, stage)
        ours = stage.__module__.startswith(f"{_OURS}.")
        if not ours:
            _load_ours()  # whose names come first, whoever is imported first
        older = _STAGES.get(name)
        if older is not None and _source(older) != _source(stage):
            raise ConfigError(
                f"two stages are called {name!r}: {_told(older)} and {_told(stage)}; give one of them another name"
            )
        if older is None and not ours and name in {*RECIPES, *OTHER_NAMES, *FORMER_NAMES}:
            raise ConfigError(f"{name!r} is a strategy of kvatlas's own; give {_told(stage)} another name")
        stage.name, stage.info = name, known
        _STAGES[name] = stage
        if older is not None:
            _forget_plans()
        return stage

    return add


def stages() -> dict[str, type[Stage]]:
    """Return all registered stages by name, sorted by axis and name."""
    _load()
    return dict(sorted(_STAGES.items(), key=lambda item: (item[1].axis, item[0])))


def stage_class(name: str) -> type[Stage]:
    """Return the stage registered under ``name``.

    Raises:
        UnknownNameError: there is none; the closest stage or recipe is suggested.
    """
    name = FORMER_NAMES.get(name, name)
    if name not in _STAGES:
        _load()
    if name in _STAGES:
        return _STAGES[name]
    if name.lower() in OTHER_NAMES:
        raise UnknownNameError(f"unknown strategy {name!r}; write {OTHER_NAMES[name.lower()]!r}")
    raise unknown_name("strategy", name, {*_STAGES, *RECIPES})


@cache
def _load() -> None:
    """Import everything that may register stages, once; what is registered later is found all the same."""
    from kvatlas.strategies.plugins import load_installed, load_named  # which load what imports this

    _load_ours()
    load_installed()
    load_named()


@cache
def _load_ours() -> None:
    for axis in filter(lambda found: found.ispkg, pkgutil.iter_modules(importlib.import_module(_OURS).__path__)):
        package = importlib.import_module(f"{_OURS}.{axis.name}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def _check(name: str, stage: type[Stage]) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a strategy cannot be called {name!r}; write letters, digits, - and _, a letter first")
    if not (isinstance(stage, type) and issubclass(stage, Stage) and hasattr(stage, "axis")):
        raise ConfigError(f"{name!r} is registered for {stage!r}, which is no stage; derive it from kvatlas.Keep")
    if "__dataclass_params__" not in vars(stage):
        raise ConfigError(
            f"{_told(stage)} is no dataclass yet; write @dataclass(frozen=True, kw_only=True) below @register({name!r})"
        )
    needed = [field.name for field in fields(stage) if field.default is MISSING and field.default_factory is MISSING]
    if needed:
        raise ConfigError(f"{_told(stage)} stands alone in sentences; give its parameter {needed[0]!r} a default")


def _source(stage: type[Stage]) -> tuple[str, str]:
    """Return what makes two classes versions of one: the file they are from, however imported, and their name."""
    file = getattr(sys.modules.get(stage.__module__), "__file__", None)
    return os.path.realpath(file) if file else stage.__module__, stage.__qualname__


def _told(stage: type[Stage]) -> str:
    return f"{stage.__qualname__} of {stage.__module__}"


def _forget_plans() -> None:
    """Forget what was worked out of strategies whose text names a stage that is another now."""
    importlib.import_module(f"{_OURS}.strategy")._plan.cache_clear()  # which imports this
