"""What a GGUF file says of itself, read without its weights: metadata and the table of its tensors.

Our own reader, since this is the gate: it holds every count and offset against the length of the file, so that a
truncated, corrupt or foreign file is one line, before anything allocates for it. The format is llama.cpp's
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvatlas.core.errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One row of the tensor table.

    Args:
        name: in llama.cpp's spelling.
        shape: the dimension whose neighbours lie side by side first, unlike torch's.
        kind: ggml's number of the format that they are stored in.
        start: of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def elements(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """A GGUF file without its weights.

    Args:
        path: of the file.
        size: of the file, bytes.
        metadata: its keys and values; arrays are lists.
        tensors: in the order of the file.
    """

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"GGUF file {str(self.path)!r} names no general.architecture; it holds no model")
        return name

    def setting(self, key: str) -> Any:
        """Return a value of the model's own section, such as ``"rope.freq_base"``; None if the file has none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def settings(self) -> dict[str, Any]:
        """The model's own section: what `setting` can return, by key."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file.

    Raises:
        CheckpointError: the file cannot be read, is no GGUF file, or ends before its header does.
        UnsupportedError: the file is of a version that nobody writes any more, or big-endian.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
            if magic != _MAGIC:
                raise CheckpointError(f"{str(path)!r} is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise CheckpointError(f"GGUF file {str(path)!r} cannot be read ({error.strerror}); check the path") from error
    except (struct.error, UnicodeDecodeError, _CorruptError) as error:
        raise CheckpointError(
            f"GGUF file {str(path)!r} is truncated or corrupt in its header ({error}); download it again"
        ) from error


class _CorruptError(Exception):
    """The header says what cannot be."""


class _Cursor:
    """Reads values one after the other; `struct.error` at the end of the file."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.position)[0]
        self.position += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.check(length)
        text = self.data[self.position : self.position + length].decode("utf-8")
        self.position += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise _CorruptError(f"a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            self.check(count * 8)  # each has at least a length
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise _CorruptError(f"an array of type {kind}")
        code = f"<{count}{_SCALARS[kind]}" if count else "<"
        self.check(count * struct.calcsize(_SCALARS[kind]))
        values = struct.unpack_from(code, self.data, self.position)
        self.position += struct.calcsize(code)
        return list(values)

    def check(self, length: int) -> None:
        """Refuse a length that reaches past the end, before memory is asked for by it."""
        left = len(self.data) - self.position
        if length > left:
            raise _CorruptError(f"{length} bytes are announced where {left} are left")


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data, len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(struct.pack(">I", version), "little") in _VERSIONS
        what = "big-endian" if swapped else f"of version {version}"
        raise UnsupportedError(f"GGUF file {str(path)!r} is {what}; versions 2 and 3 are read, convert it anew")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    rows = [_tensor_row(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _CorruptError(f"an alignment of {alignment}")
    start = -(-cursor.position // alignment) * alignment
    tensors = tuple(
        GgufTensor(name=name, shape=shape, kind=kind, start=start + offset) for name, shape, kind, offset in rows
    )
    return GgufHeader(path=path, size=len(data), metadata=metadata, tensors=tensors)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return name, shape, kind and offset of the next tensor."""
    name = cursor.string()
    num_dimensions = cursor.scalar("I")
    if num_dimensions > _MOST_DIMENSIONS:
        raise _CorruptError(f"tensor {name!r} of {num_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")
