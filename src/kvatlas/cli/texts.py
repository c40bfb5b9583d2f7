"""Texts from files and from the standard input, exactly as they are: line ends, spaces and all."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from kvatlas.core.errors import ConfigError
from kvatlas.core.units import format_bytes

# A UTF-32 mark begins as one of UTF-16 does, so it is looked for first.
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LARGEST = 2**28  # bytes; no context is as long, and some files never end


def read_text(path: Path) -> str:
    """Return the text of a file, or of the standard input for ``-``.

    It is UTF-8, or what its byte order mark says. The mark is no part of the text.

    Raises:
        ConfigError: it cannot be read, is empty, too large, or no text.
    """
    name = "the standard input" if str(path) == "-" else f"prompt file {str(path)!r}"
    data = _bytes(path, name)
    if len(data) > _LARGEST:
        raise ConfigError(f"{name} is larger than {format_bytes(_LARGEST)}, which no context holds; cut it")
    encoding = next((encoding for mark, encoding in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at {error.start}"
        raise ConfigError(
            f"{name} is not {encoding.removesuffix('-sig').upper()} text ({byte}); convert it first, for instance with "
            "iconv -f latin1 -t utf-8"
        ) from error
    if "\0" in text:
        raise ConfigError(f"{name} has a NUL character at {text.index(chr(0))}, so it is no text; convert it to UTF-8")
    if not text:
        raise ConfigError(f"{name} is empty; write at least one character")
    return text


def _bytes(path: Path, name: str) -> bytes:
    if str(path) == "-" and (sys.stdin is None or sys.stdin.closed):
        raise ConfigError(f"{name} is closed; give a file, or a prompt after 'kvatlas generate'")
    try:
        if str(path) == "-":
            source = getattr(sys.stdin, "buffer", None)
            data: bytes = sys.stdin.read().encode() if source is None else source.read(_LARGEST + 1)
            return data
        with path.open("rb") as file:
            return file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:  # a path with a NUL character, or with half of a surrogate pair
        raise ConfigError(f"{name} cannot be read ({error}); check the path") from error
