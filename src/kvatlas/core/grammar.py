"""The one small grammar of strategies: ``stage(param=value, ...) | stage``, for CLI, config, API and labels.

Values are integers, floats, true/false, or words such as ``host`` and ``16GB/s``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvatlas.core.errors import ConfigError

Value = int | float | bool | str

_STAGE = re.compile(r"^\s*([A-Za-z_][\w-]*)\s*(?:\((.*)\))?\s*$", re.DOTALL)
_NAMED = re.compile(r"^\s*([A-Za-z_]\w*)\s*=\s*(.*?)\s*$", re.DOTALL)
_WORD = re.compile(r"^[\w./+:-]+$")


@dataclass(frozen=True, kw_only=True)
class StageCall:
    """One stage as written: its name, positional values and named values."""

    name: str
    positional: tuple[Value, ...] = ()
    named: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        parts = [format_value(value) for value in self.positional]
        parts += [f"{name}={format_value(value)}" for name, value in self.named]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


def parse_sentence(text: str) -> list[StageCall]:
    """Return the stages of ``"h2o(heavy=0.1, recent=0.1) | fp16"`` in the order written.

    Raises:
        ConfigError: the text does not follow the grammar; names what was read.
    """
    if not text.strip():
        raise ConfigError("strategy is empty; write for instance 'full' or 'h2o(heavy=0.1, recent=0.1)'")
    return [_parse_stage(part, text) for part in text.split("|")]


def format_value(value: Value) -> str:
    """Return the text that parses back to ``value``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def _parse_stage(part: str, whole: str) -> StageCall:
    match = _STAGE.match(part)
    if match is None:
        raise ConfigError(f"cannot read stage {part.strip()!r} in strategy {whole!r}; write name(param=value, ...)")
    name, arguments = match.groups()
    positional: list[Value] = []
    named: dict[str, Value] = {}
    for argument in arguments.split(",") if arguments and arguments.strip() else []:
        match = _NAMED.match(argument)
        if match is None:
            if named:
                raise ConfigError(f"{argument.strip()!r} follows a named parameter in {part.strip()!r}; name it too")
            positional.append(_parse_value(argument.strip(), part))
            continue
        key, text = match.groups()
        if key in named:
            raise ConfigError(f"parameter {key!r} is given twice in {part.strip()!r}")
        named[key] = _parse_value(text, part)
    return StageCall(name=name, positional=tuple(positional), named=tuple(named.items()))


def _parse_value(text: str, part: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if not _WORD.match(text):
        raise ConfigError(f"cannot read value {text!r} in {part.strip()!r}; write a number, true, false or a word")
    return text
