"""Load a model: bundled, from a folder, from the hub, or random; checked before the first token.

transformers warns where it should stop: weights that are missing from a checkpoint are drawn at random and
the model talks nonsense. Here every such case is an error of one line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvatlas.core.errors import CapacityError, CheckpointError, ConfigError, UnsupportedError
from kvatlas.models.adapter import Adapter
from kvatlas.models.coverage import layer_kinds, module_kinds
from kvatlas.models.linear import LinearChoice, check_choice
from kvatlas.models.probe import probe_model
from kvatlas.models.quiet import quiet

BUNDLED_DIR = Path(__file__).parent / "bundled"
RANDOM_PREFIX = "random:"

DType = Literal["auto", "float32", "bfloat16", "float16"]

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
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
    device: str = "cpu",
    linear_weights: LinearChoice = "auto",
) -> LoadedModel:
    """Return a model that passed the load-time probe.

    Args:
        source: a folder, a hub id, ``"random:llama-100m"`` (see `kvatlas.models.random`), or None for the
            bundled model.
        dtype: of weights and activations. ``"auto"`` is float32 on the CPU, where bfloat16 is several times
            slower without hardware support, and the checkpoint's own elsewhere.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"``.
        linear_weights: copies of weights from which linears compute steps of few tokens on the CPU in float32:
            ``"auto"`` makes 16-bit copies where these are exact; ``"fp16"``, ``"bf16"`` and ``"int8"`` round;
            ``"fp32"`` and ``"off"`` make none, and ``"off"`` leaves decoder layers to transformers, too. See
            `kvatlas.models.linear.SmallLinears`.

    Raises:
        ConfigError: dtype, device or ``linear_weights`` is unknown.
        CheckpointError: the checkpoint is missing, incomplete or corrupt.
        UnsupportedError: the family, or this dtype on this device, is refused, or it has no linears with such weights.
        CapacityError: the weights do not fit on the device, or their copies into memory.
    """
    torch_dtype = resolve_dtype(dtype, device)
    check_choice(linear_weights)
    if isinstance(source, str) and source.startswith(RANDOM_PREFIX):
        from kvatlas.models.random import random_model  # random builds on this module

        return random_model(source, dtype=dtype, device=device, linear_weights=linear_weights)
    location, name = _locate(source)
    model = _load_weights(location, torch_dtype)
    adapter = adapt(_place(model, device, name), name=name, linear_weights=linear_weights)
    return LoadedModel(adapter=adapter, tokenizer=_load_tokenizer(location), name=name)


def name_of(source: str | Path | None) -> str:
    """Return what reports will call a model, without loading it; sources are those of `load_model`.

    Raises:
        UnknownNameError: there is no random model of this name.
        CheckpointError: the folder does not exist or is no checkpoint, and it is no hub id.
    """
    if isinstance(source, str) and source.startswith(RANDOM_PREFIX):
        from kvatlas.models.random import random_name  # random builds on this module

        return random_name(source)
    return _locate(source)[1]


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


def resolve_dtype(dtype: str, device: str) -> torch.dtype | None:
    """Return the torch dtype to load, or None for the checkpoint's own.

    Raises:
        ConfigError: the name of the dtype or device is unknown.
        UnsupportedError: the device is absent, or computes this dtype wrongly or not at all.
    """
    if dtype not in get_args(DType):
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(get_args(DType))}")
    kind = _check_device(device)
    if dtype == "auto":
        return torch.float32 if kind == "cpu" else None
    if dtype == "float16" and kind == "cpu":
        raise UnsupportedError("float16 on the CPU overflows above 65504 and gains no speed; use float32 or bfloat16")
    if dtype == "bfloat16" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise UnsupportedError(f"device {device!r} has no bfloat16; use float16 or float32")
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def _check_device(device: str) -> str:
    """Return the kind of a device that is there."""
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"unknown device {device!r}; choose cpu, cuda or cuda:<index>")
    kind, index = match[1], int(match[2] or 0)
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r} was asked for, but torch finds no CUDA device; use cpu")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise UnsupportedError(f"device {device!r} does not exist; torch finds {torch.cuda.device_count()}")
    return kind


def _locate(source: str | Path | None) -> tuple[str, str]:
    """Return what transformers loads from, and the model's name."""
    if source is None:
        _check_folder(BUNDLED_DIR)
        return str(BUNDLED_DIR), "bundled"
    folder = Path(source).expanduser()
    if folder.exists():
        _check_folder(folder)
        return str(folder), folder.resolve().name
    if isinstance(source, Path) or not _HUB_ID.match(source):
        raise CheckpointError(f"model folder {str(source)!r} does not exist; give a folder or a hub id")
    return source, source


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose configuration cannot be read, before transformers guesses what it could be."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"model {str(folder)!r} is not a folder; give one with config.json and weights")
    if not path.is_file():
        raise CheckpointError(f"model folder {str(folder)!r} has no config.json; it is not a checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{str(path)!r} names no model_type; it is not a transformers checkpoint")


def _load_weights(location: str, dtype: torch.dtype | None) -> PreTrainedModel:
    arguments: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
    arguments["local_files_only"] = Path(location).exists()
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(location, **arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CapacityError(f"the weights of {location!r} do not fit into memory: {error}") from error
    except Exception as error:  # transformers raises anything here, ZeroDivisionError included.
        raise CheckpointError(f"model {location!r} cannot be loaded: {_explain(error)}") from error
    missing = sorted(str(key) for key in report["missing_keys"])
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])
    if missing or mismatched:
        wrong = "missing" if missing else "of another shape than config.json says"
        keys = missing or mismatched
        raise CheckpointError(
            f"model {location!r}: {len(keys)} weights are {wrong}, first {keys[0]}; download it again"
        )
    loaded: PreTrainedModel = model
    return loaded


def _explain(error: Exception) -> str:
    """Return the first line of a loading error, and what to do about it where that is known."""
    text = str(error).strip()
    kind = type(error).__name__
    if kind == "SafetensorError":
        return f"a safetensors file is truncated or corrupt ({text}); download it again"
    if "ignore_mismatched_sizes" in text:
        return "weights have another shape than config.json says; download it again"
    if "Unrecognized configuration class" in text:
        return "it is not a causal language model of transformers"
    if "trust_remote_code" in text:
        return "it needs code from its repository, which kvatlas does not run; use a family of transformers"
    return " ".join(f"{kind}: {text}".split())[:300]


def _place(model: PreTrainedModel, device: str, name: str) -> PreTrainedModel:
    try:
        placed: PreTrainedModel = model.to(device)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"the weights of {name!r} do not fit on {device}; use a smaller dtype") from error
    return placed


def _load_tokenizer(location: str) -> PreTrainedTokenizerBase | None:
    """Return the checkpoint's tokenizer; None if it has none, since token ids can be used without."""
    folder = Path(location)
    if folder.exists() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        return None
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                location, local_files_only=folder.exists()
            )
    except Exception as error:  # tokenizers raises bare Exception for a broken file.
        raise CheckpointError(f"the tokenizer of {location!r} cannot be loaded: {_explain(error)}") from error
    return tokenizer
