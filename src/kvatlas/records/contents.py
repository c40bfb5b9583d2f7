"""Tell files and model folders apart by what is in them: a name says nothing of what it named yesterday."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kvatlas.core.errors import CheckpointError
from kvatlas.records.schema import Params

_PIECES, _PIECE_BYTES = 256, 4096
_READ_WHOLE = 16 * 2**20  # bytes; larger files of a model are weights
_OF_A_MODEL = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


def model_params(source: str | None) -> Params:
    """Return what a point says of a model beside its name: for a folder, a digest, since two may share a name.

    Args:
        source: a folder, a hub id, a random model, or None for the bundled one.

    Raises:
        CheckpointError: a file of the folder cannot be read.
    """
    folder = None if source is None else Path(source).expanduser()
    if folder is None or not folder.is_dir():
        return {}
    try:
        return {"model_digest": folder_digest(folder)}
    except OSError as error:
        raise CheckpointError(
            f"model folder {str(source)!r} cannot be read ({error.strerror}); check its files' rights"
        ) from error


def file_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of all that a file holds.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def folder_digest(folder: Path) -> str:
    """Return 16 hexadecimal digits of a checkpoint: names, sizes and contents of its files, whatever its own name.

    Of a large file its beginning, its end and evenly spaced pieces are read, since other weights differ everywhere;
    so no model has to be loaded to be told from another.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted({path for pattern in _OF_A_MODEL for path in folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _READ_WHOLE:
                digest.update(file.read())
                continue
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1), os.SEEK_SET)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
