"""Bytes and seconds: parsed from users, kept as plain numbers inside, formatted when printed."""

from __future__ import annotations

import re

from kvatlas.core.errors import ConfigError

_BINARY = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DECIMAL = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*$", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Return a number of bytes from ``"512MiB"``, ``"2GB"`` (decimal), ``"1g"`` (binary) or a plain integer.

    Raises:
        ConfigError: the text is not a positive size.
    """
    if isinstance(text, int):
        size = float(text)
    else:
        match = _BYTES.match(text)
        if match is None:
            raise ConfigError(f"memory size {text!r} is not understood; write it like 512MiB, 2GB or 1073741824")
        number, prefix, binary, byte = match.groups()
        table = _DECIMAL if byte and not binary else _BINARY
        size = float(number) * table[prefix.lower()]
    if size < 1:
        raise ConfigError(f"memory size {text!r} must be at least 1 byte")
    return int(size)


def format_bytes(size: float) -> str:
    """Return ``"1.5 MiB"``: three significant digits in the largest binary unit that keeps the number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            digits = f"{size:.0f}" if unit == "B" else f"{float(f'{size:.3g}'):g}"  # 1020, not 1.02e+03
            return f"{digits} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Return ``"12.3 ms"``, ``"4.56 s"`` or ``"3 min 20 s"``."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def parse_tier_bytes(text: str | int) -> int:
    """Return the byte budget of a tier that may be left out: 0 is none.

    Raises:
        ConfigError: the text is no size.
    """
    return 0 if str(text).strip() == "0" else parse_bytes(text)
