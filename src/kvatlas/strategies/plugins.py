"""Strategies of others: of installed packages, by entry points, and of single files."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from kvatlas.core.errors import ConfigError, KvatlasError, one_line
from kvatlas.core.messages import told
from kvatlas.strategies import registry

GROUP = "kvatlas.strategies"
"""Entry points of this group name a module, or a class in it, that registers stages when it is imported."""
VARIABLE = "KVATLAS_PLUGINS"
"""Names files that every process of ours imports, separated as paths are in PATH."""

_LOG = logging.getLogger(__name__)


def load_installed() -> None:
    """Import the entry points of installed packages; one that fails is a warning, and nothing of it stays."""
    for entry in entry_points(group=GROUP):
        try:
            with _all_or_nothing():
                entry.load()
        except (Exception, SystemExit) as error:
            _LOG.warning("%s", one_line(f"strategies of {entry.name!r} ({entry.value}) are left out: {_told(error)}"))


def load_named() -> None:
    """Import the files that the environment names.

    Raises:
        ConfigError: as of `load_file`.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load_file(Path(name))


def load_files(paths: Sequence[Path]) -> None:
    """Import files, and have every process that is started from here do so.

    Raises:
        ConfigError: as of `load_file`.
    """
    for path in paths:
        load_file(path)
    named = [*filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)), *map(os.path.abspath, paths)]
    if paths:
        os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys(named))


def load_file(path: Path) -> None:
    """Import a Python file that registers stages, once; its module is called by its path.

    Raises:
        ConfigError: it cannot be read, is not Python, fails, or registers nothing.
    """
    said, whole = f"plugin {str(path)!r}", os.path.abspath(path)
    if whole in sys.modules:
        return
    if path.suffix != ".py":
        raise ConfigError(f"{said} is not Python; name a file that ends in .py")
    try:
        path.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{said} cannot be read ({why}); check the path") from error
    spec = importlib.util.spec_from_file_location(whole, whole)
    assert spec is not None and spec.loader is not None, "files that end in .py have a loader"
    module = sys.modules[whole] = importlib.util.module_from_spec(spec)
    try:
        with _all_or_nothing():
            spec.loader.exec_module(module)
            if not any(stage.__module__ == whole for stage in registry._STAGES.values()):
                raise ConfigError("it registers no stage; decorate one with @kvatlas.register('name', summary='...')")
    except (Exception, SystemExit) as error:
        del sys.modules[whole]
        raise ConfigError(f"{said} is refused: {_told(error, whole)}") from error
    except BaseException:
        del sys.modules[whole]
        raise


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """Undo what is registered inside if it fails."""
    registry._load_ours()
    before = dict(registry._STAGES)
    try:
        yield
    except BaseException:
        registry._STAGES.clear()
        registry._STAGES.update(before)
        raise


def _told(error: Exception | SystemExit, file: str | None = None) -> str:
    """Return an error in one line, with the line of ``file`` where it happened."""
    if isinstance(error, KvatlasError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno} is not Python ({error.msg})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    at = f"line {lines[-1]}: " if lines else ""
    return at + told(error)  # type: ignore[arg-type]  # that of an exit is told as others are
