"""Unpacked copies of GGUF files in the cache folder: made once, held against their manifest at every use.

Unpacking takes many times as long as reading the result. A copy is written beside its place and renamed, so a folder
under its final name is whole or was damaged later; sizes and SHA-256 in the manifest tell. A lock lets one process
unpack and others wait; it goes with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvatlas.core.folders import cache_folder
from kvatlas.core.messages import told
from kvatlas.core.units import format_bytes
from kvatlas.models.checkpoint import load_checkpoint
from kvatlas.models.gguf import load_gguf, unpacked_bytes
from kvatlas.models.gguf_header import GgufHeader
from kvatlas.models.gguf_tokenizer import gguf_tokenizer
from kvatlas.models.quiet import quiet

MANIFEST = "kvatlas-copy.json"

_LOG = logging.getLogger(__name__)
_FORMAT = 2  # of a copy; raise it when a file would be unpacked or its tokenizer be made in another way
_OTHER_FILES_BYTES = 64 << 20  # of disk, for all but the weights
_COPY_DTYPE = torch.float32  # in which every value of every quantized format is what the gguf package computes


def load_kept(header: GgufHeader, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return model and tokenizer of a GGUF file from its copy, which is made if there is none.

    Where no copy can be kept, a line says so and the file is unpacked.

    Raises:
        CheckpointError, UnsupportedError, CapacityError: as `load_gguf`.
    """
    digest = _sha256(header.path)
    target = cache_folder() / f"{header.path.stem}-{digest[:12]}"
    if _is_whole(target, digest):
        return load_checkpoint(str(target), dtype)
    with _locked(target, unpacked_bytes(header, _COPY_DTYPE)) as ours:
        if ours and _is_whole(target, digest):  # made by another process meanwhile
            return load_checkpoint(str(target), dtype)
        if target.exists():
            _LOG.warning("the copy %s is damaged; unpacking anew", target)
        model, tokenizer = load_gguf(header, _COPY_DTYPE if ours else dtype), gguf_tokenizer(header)
        if ours and _keep(target, header, digest, model, tokenizer):
            del model
            return load_checkpoint(str(target), dtype)
    return model.to(dtype), tokenizer


def _is_whole(target: Path, digest: str) -> bool:
    """Return whether a copy of this source is there, and every byte of it as it was written."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["source"]["sha256"] != digest:
            return False
        return "config.json" in manifest["files"] and all(
            (target / name).stat().st_size == facts["bytes"] and _sha256(target / name) == facts["sha256"]
            for name, facts in manifest["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # whatever a damaged manifest may hold
        return False


@contextmanager
def _locked(target: Path, needed: int) -> Iterator[bool]:
    """Hold the right to make a copy while the block runs; False, with a warning, if none can be made."""
    with ExitStack() as held:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((target.parent / f".{target.name}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in target.parent.glob(f".{target.name}.*.partial"):  # by a process that was killed
                shutil.rmtree(left_over)
            free = shutil.disk_usage(target.parent).free
        except OSError as error:
            _warn_unkept(target, error)
            yield False
            return
        fits = needed + _OTHER_FILES_BYTES <= free or target.exists()
        if not fits:
            _warn_unkept(target, f"it takes {format_bytes(needed)} of disk and {format_bytes(free)} are free")
        yield fits


def _keep(
    target: Path,
    header: GgufHeader,
    digest: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> bool:
    """Write a copy, all or nothing; return whether it is there."""
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        partial.mkdir()
        with quiet():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        manifest = json.dumps(_manifest(header, digest, partial), indent=2)
        (partial / MANIFEST).write_text(manifest, encoding="utf-8")
        partial.rename(target)
    except Exception as error:  # tokenizers raises bare Exception where the disk is full.
        _warn_unkept(target, told(error))
        return False
    finally:  # also after Ctrl-C; renamed if all went well
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _manifest(header: GgufHeader, digest: str, folder: Path) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "source": {"file": header.path.name, "bytes": header.size, "sha256": digest},
        "made_with": {name: version(name) for name in ("kvatlas", "transformers", "gguf", "torch")},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
        },
    }


def _warn_unkept(target: Path, reason: object) -> None:
    _LOG.warning("no copy of the unpacked model is kept as %s (%s); the next start unpacks again", target, reason)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
