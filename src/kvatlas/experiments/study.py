"""A study in one file: which experiments, where the records go, and every setting that differs from the preset."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from kvatlas.core.errors import ConfigError
from kvatlas.core.names import unknown_name
from kvatlas.experiments.settings import Settings

_KINDS = {int: "a whole number", float: "a number", str: "a text in quotes"}


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """What a file says; None or nothing where it is silent.

    Args:
        preset: name of the preset that it changes.
        experiments: names.
        records: path of the records file.
        changes: field of Settings -> value.
    """

    preset: str | None = None
    experiments: tuple[str, ...] = ()
    records: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def read_study(path: Path) -> StudyFile:
    """Return what a TOML file says.

    Raises:
        ConfigError: the file cannot be read, says nothing, or a value is of the wrong type.
        UnknownNameError: a key is no setting.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a mark of byte order
    except OSError as error:
        raise ConfigError(f"study {str(path)!r} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"study {str(path)!r} is not UTF-8 text; write it anew") from error
    return parse_study(text, str(path))


def parse_study(text: str, source: str) -> StudyFile:
    """Return what a TOML text says; ``source`` names it in errors. See `read_study`."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and deep lists among them
        raise ConfigError(f"study {source!r} is not TOML: {error}; mend it there") from error
    if not table:
        raise ConfigError(f"study {source!r} says nothing; write a setting, as --dump-config prints them")
    types = {"preset": str, "experiments": tuple[str, ...], "records": str} | get_type_hints(Settings)
    for key in table:
        if key not in types:
            raise unknown_name(f"setting in {source!r}", key, types)
    values = {key: _typed(key, value, types[key], source) for key, value in table.items()}
    return StudyFile(
        preset=values.pop("preset", None),
        experiments=values.pop("experiments", ()),
        records=values.pop("records", None),
        changes=values,
    )


def dump_study(settings: Settings, experiments: Iterable[str] = (), records: str | None = None) -> str:
    """Return TOML that reads back to equal settings, whatever the preset; "" stands for no model of its own."""
    table: dict[str, Any] = {"experiments": list(experiments)} if experiments else {}
    if records is not None:
        table["records"] = records
    table |= {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())


def _typed(key: str, value: Any, kind: Any, source: str) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key}={value!r} in {source!r} is no list; write it in square brackets")
        return tuple(_typed(key, one, get_args(kind)[0], source) for one in value)
    if NoneType in get_args(kind):
        return _typed(key, value, str, source) or None
    if get_args(kind):  # a Literal; what it may be is checked where it is used
        kind = str
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: true is no number
        raise ConfigError(f"{key}={value!r} in {source!r} is of the wrong type; write {_KINDS[kind]}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if value is None:
        return '""'
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
