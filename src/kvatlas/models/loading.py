"""Load a model: bundled, from a folder, a GGUF file or the hub, or random; checked before the first token."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvatlas.core.errors import CapacityError, CheckpointError, ConfigError, UnsupportedError
from kvatlas.models.adapter import Adapter
from kvatlas.models.checkpoint import check_finite, load_checkpoint
from kvatlas.models.coverage import layer_kinds, module_kinds
from kvatlas.models.fast import LinearChoice, check_choice
from kvatlas.models.gguf import check_gguf, load_gguf, own_dtype
from kvatlas.models.gguf_header import read_header
from kvatlas.models.gguf_tokenizer import gguf_tokenizer
from kvatlas.models.precision import DType, resolve_device, resolve_dtype
from kvatlas.models.probe import probe_model
from kvatlas.models.quiet import quiet
from kvatlas.models.smollm2 import SMOLLM2, smollm2_file

BUNDLED_DIR = Path(__file__).parent / "bundled"
RANDOM_PREFIX = "random:"

_GGUF_SUFFIX = ".gguf"
_KEEP_GGUF = "KVATLAS_KEEP_GGUF"  # in the environment: unpacked copies of all GGUF files are kept, not of SmolLM2 only
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run.

    Args:
        adapter: runs it.
        tokenizer: of the checkpoint, or None if it has none; requests then give token ids.
        name: what reports call it.
    """

    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase | None
    name: str


def load_model(
    source: str | Path | None,
    *,
    dtype: DType = "auto",
    device: str | torch.device = "auto",
    linear_weights: LinearChoice = "auto",
) -> LoadedModel:
    """Return a model that passed the load-time probe.

    Args:
        source: a folder, a GGUF file, a hub id, ``"smollm2-135m"`` (see `kvatlas.models.smollm2`),
            ``"random:llama-100m"`` (see `kvatlas.models.random`), or None for the bundled model. GGUF files are
            unpacked; with ``KVATLAS_KEEP_GGUF=1`` in the environment the result is kept in the cache folder, where
            SmolLM2's always is.
        dtype: of weights and activations. ``"auto"`` is what runs a checkpoint fastest without rounding it: on the
            CPU float32, unless the processor has products of bfloat16 numbers that are faster (see
            `kvatlas.models.precision`), and the checkpoint's own elsewhere.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:<index>"``, or ``"auto"``: a CUDA device if there is one.
        linear_weights: copies of weights from which linears compute steps of few tokens on the CPU in float32:
            ``"auto"`` makes 16-bit copies where these are exact; ``"fp16"``, ``"bf16"`` and ``"int8"`` round;
            ``"fp32"`` and ``"off"`` make none, and ``"off"`` leaves decoder layers to transformers, too. See
            `kvatlas.models.fast.linears.SmallLinears`.

    Raises:
        ConfigError: dtype, device or ``linear_weights`` is unknown.
        CheckpointError: the checkpoint is missing, incomplete or corrupt, or holds weights that are no numbers.
        UnsupportedError: the family, or this dtype on this device, is refused, it has no linears with such weights, it
            needs code of its own, or a package that reads it is missing.
        CapacityError: the weights do not fit on the device, or their copies into memory.
    """
    torch_dtype, device = resolve_dtype(dtype, device), resolve_device(device)
    check_choice(linear_weights)
    if isinstance(source, str) and source.startswith(RANDOM_PREFIX):
        from kvatlas.models.random import random_model  # random builds on this module

        return random_model(source, dtype=dtype, device=device, linear_weights=linear_weights)
    found = _locate(source)
    model, tokenizer = _load(found, torch_dtype)
    check_finite(model, found.name)
    adapter = adapt(_place(model, device, found.name), name=found.name, linear_weights=linear_weights)
    return LoadedModel(adapter=adapter, tokenizer=tokenizer, name=found.name)


def name_of(source: str | Path | None) -> str:
    """Return what reports will call a model, without loading it; sources are those of `load_model`.

    Raises:
        UnknownNameError: there is no random model of this name.
        CheckpointError: the folder or file does not exist or is no checkpoint, and it is no hub id.
        UnsupportedError: the model's package is not installed.
    """
    if isinstance(source, str) and source.startswith(RANDOM_PREFIX):
        from kvatlas.models.random import random_name  # random builds on this module

        return random_name(source)
    return _locate(source).name


def adapt(model: PreTrainedModel, *, name: str | None = None, linear_weights: LinearChoice = "auto") -> Adapter:
    """Return an adapter for a model the caller already has, after probing its family.

    The model is switched to kvatlas' attention and linears and to eval mode; ``Adapter.restore`` undoes that.

    Raises:
        ConfigError: ``linear_weights`` is unknown; see `load_model`.
        UnsupportedError: the family is refused; the text names it and the reason.
        CapacityError: there is too little memory for the copies of weights that were asked for.
    """
    check_choice(linear_weights)
    dtype = str(model.dtype).removeprefix("torch.")
    resolve_dtype(dtype if dtype in get_args(DType) else "auto", str(model.device))  # refuses what cannot work
    result = probe_model(model)
    family = model.config.model_type
    if not result.supported:
        raise UnsupportedError(f"model family {family!r} cannot run here: {result.reason}; use another one")
    with quiet():
        adapter = Adapter(model, name=name, linear_weights=linear_weights)
    untested = (layer_kinds(adapter.shape) | module_kinds(model)) - result.kinds
    if untested:
        adapter.restore()
        raise UnsupportedError(
            f"model family {family!r} cannot run here: it has {', '.join(sorted(untested))}, "
            "which the probe's clone had not"
        )
    return adapter


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Where a model is: a folder or hub id, or a GGUF file, of which an unpacked copy may be kept."""

    name: str
    location: str = ""
    gguf: Path | None = None
    kept: bool = False


def _locate(source: str | Path | None) -> _Found:
    if source is None:
        _check_folder(BUNDLED_DIR)
        return _Found(name="bundled", location=str(BUNDLED_DIR))
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"a model is a folder, a GGUF file, a hub id or a name, got {type(source).__name__}")
    if source == SMOLLM2:
        return _Found(name=SMOLLM2, gguf=smollm2_file(), kept=True)
    try:
        return _found_at(source, Path(source).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, a home that is not there
        raise CheckpointError(f"model {str(source)!r} is no path that can be looked at: {error}") from error


def _found_at(source: str | Path, path: Path) -> _Found:
    """Return what is at a path, or a hub id."""
    if path.suffix.lower() == _GGUF_SUFFIX and not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"GGUF file {str(source)!r} does not exist; check the path")
        return _Found(name=path.stem, gguf=path, kept=os.environ.get(_KEEP_GGUF, "0") not in ("", "0"))
    if path.exists():
        _check_folder(path)
        return _Found(name=path.resolve().name, location=str(path))
    if not isinstance(source, str) or not _HUB_ID.match(source):
        raise CheckpointError(f"model folder {str(source)!r} does not exist; give a folder, a GGUF file or a hub id")
    return _Found(name=source, location=source)


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose configuration cannot be read, before transformers guesses what it could be."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"model {str(folder)!r} is not a folder and not named *.gguf; give one with config.json and weights"
        )
    if not path.is_file():
        file = next(folder.glob(f"*{_GGUF_SUFFIX}"), None)
        hint = f"give its file {str(file)!r}" if file else "it is not a checkpoint"
        raise CheckpointError(f"model folder {str(folder)!r} has no config.json; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{str(path)!r} names no model_type; it is not a transformers checkpoint")


def _load(found: _Found, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    if found.gguf is None:
        return load_checkpoint(found.location, dtype)
    header = read_header(found.gguf)
    check_gguf(header)
    dtype = dtype or own_dtype(header)
    if found.kept:
        from kvatlas.models.copies import load_kept  # needs file locks, which not every system has

        return load_kept(header, dtype)
    return load_gguf(header, dtype), gguf_tokenizer(header)


def _place(model: PreTrainedModel, device: str, name: str) -> PreTrainedModel:
    if device == "cpu" and model.dtype is torch.float16:  # the checkpoint's own, which the CPU cannot do well
        model = model.float()
    try:
        placed: PreTrainedModel = model.to(device)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"the weights of {name!r} do not fit on {device}; use a smaller dtype") from error
    return placed
