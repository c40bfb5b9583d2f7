"""Load a GGUF file, the format of llama.cpp, as a transformers model in floating point.

transformers unpacks the whole file, and drops in silence what it does not know: RoPE scaling, biases, windows. So the
header is read first (`gguf_header`), memory is asked for before it is taken, and what the file says is held against
what transformers made of it.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel

from kvatlas.core.errors import CapacityError, CheckpointError, UnsupportedError
from kvatlas.core.messages import shown
from kvatlas.core.units import format_bytes
from kvatlas.models.checkpoint import explain
from kvatlas.models.gguf_header import GgufHeader, GgufTensor
from kvatlas.models.quiet import quiet

HOW_TO_INSTALL = "pip install 'kvatlas[smollm2]'"

_PACKAGES = ("gguf", "accelerate")
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOAT32_BYTES = 4
_COPIES_OF_ONE_TENSOR = 4  # that are alive while transformers unpacks it: blocks, values, permuted values, tensor
_LLAMA3_FREQUENCIES = "rope_freqs.weight"
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_BLOCK = re.compile(r"^blk\.\d+\.")
# Which dimension of which tensor, blocks without their number, is which size in the model's section.
_SIZES = {
    ("token_embd.weight", 0): "embedding_length",
    ("token_embd.weight", 1): "vocab_size",
    ("ffn_down.weight", 0): "feed_forward_length",
    ("ffn_down_exps.weight", 0): "expert_feed_forward_length",
    ("ffn_down_exps.weight", 2): "expert_count",
}
# What changes logits and not one shape: the key in the file, and its names in transformers' config.
_SILENT = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "shortconv.l_cache": ("conv_L_cache",),
    "use_parallel_residual": ("use_parallel_residual",),
}
# What transformers does not read, and the values at which there is nothing to read.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "embedding_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "router_logit_softcapping": (0,),
    "swin_norm": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
# What acts on shapes, which are compared, on no logits, or only where RoPE is scaled, which is refused.
_HARMLESS = frozenset(
    {
        *_SIZES.values(),
        "block_count",
        "context_length",
        "expert_shared_feed_forward_length",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
    }
)


def check_gguf(header: GgufHeader) -> None:
    """Refuse a file that cannot be loaded, by what its header says.

    Raises:
        UnsupportedError: the packages that read GGUF are missing, or the file is one part of several, holds no language
            model, or holds tensors of an unknown format.
        CheckpointError: the file ends before its tensors do.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UnsupportedError(f"GGUF files need {' and '.join(missing)}; install with: {HOW_TO_INSTALL}")
    path = str(header.path)
    parts, part = (header.metadata.get(key) for key in ("split.count", "split.no"))
    if parts not in (None, 0, 1):
        raise UnsupportedError(
            f"GGUF file {path!r} is part {part} (from 0) of {parts}; join them first: llama-gguf-split --merge"
        )
    if (kind := header.metadata.get("general.type", "model")) != "model":
        raise UnsupportedError(f"GGUF file {path!r} holds no model but a {kind!r}; give the file of the model itself")
    if not header.tensors:
        raise CheckpointError(f"GGUF file {path!r} of architecture {header.architecture!r} holds no weights")
    end = max(tensor.start + _stored_bytes(header, tensor) for tensor in header.tensors)
    if end > header.size:
        raise CheckpointError(
            f"GGUF file {path!r} is truncated: it has {header.size} of {end} bytes; download it again"
        )


def unpacked_bytes(header: GgufHeader, dtype: torch.dtype) -> int:
    """Return what the weights of a file take in this dtype."""
    return sum(tensor.elements for tensor in header.tensors) * dtype.itemsize


def own_dtype(header: GgufHeader) -> torch.dtype:
    """Return the dtype in which a file's matrices are exact: their own, or float32 if they are quantized."""
    names = {_format(header, tensor).name for tensor in header.tensors}
    for dtype in (torch.float16, torch.bfloat16):
        if _PLAIN[dtype] in names and names <= {_PLAIN[dtype], _PLAIN[torch.float32]}:
            return dtype
    return torch.float32


def load_gguf(header: GgufHeader, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a file that passed `check_gguf`, all weights unpacked.

    Raises:
        CapacityError: there is too little memory.
        UnsupportedError: transformers does not read this architecture, or not all that this file says.
        CheckpointError: the header describes another model than the file holds, or the weights cannot be loaded.
    """
    _check_sizes(header)
    _check_memory(header, dtype)
    place = {"gguf_file": header.path.name, "local_files_only": True, "trust_remote_code": False}
    folder = str(header.path.parent)
    try:
        with quiet(), redirect_stderr(StringIO()):  # a progress bar of tqdm's own
            config = AutoConfig.from_pretrained(folder, **place)
            _check_config(header, config)
            _check_weights(header, config)
            unpack = GgufConfig(gguf_file=header.path.name, dequantize=True)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, quantization_config=unpack, output_loading_info=True, **place
            )
    except (UnsupportedError, CheckpointError, CapacityError):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CapacityError(f"the weights of {str(header.path)!r} do not fit into memory: {error}") from error
    except Exception as error:  # transformers raises anything here.
        raise _refusal(header, error) from error
    if report["missing_keys"]:
        missing = sorted(map(str, report["missing_keys"]))
        raise CheckpointError(f"GGUF file {str(header.path)!r} lacks {len(missing)} weights, first {missing[0]}")
    _end_tokens(header, model)
    loaded: PreTrainedModel = model
    return loaded


def _format(header: GgufHeader, tensor: GgufTensor) -> Any:
    """Return the format of a tensor in the words of the gguf package, if it can be unpacked."""
    kind = unpacked_kind(tensor.kind)
    if kind is None:
        raise UnsupportedError(
            f"GGUF file {str(header.path)!r}: tensor {tensor.name!r} is of a format (number {tensor.kind}) that the "
            "gguf package does not unpack; quantize the model to another one, such as Q8_0"
        )
    return kind


@cache
def unpacked_kind(number: int) -> Any | None:
    """Return a format in the words of the gguf package; None if it does not unpack it, which is tried once."""
    import gguf  # of the extra

    try:
        kind = gguf.GGMLQuantizationType(number)
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kind


def _stored_bytes(header: GgufHeader, tensor: GgufTensor) -> int:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[_format(header, tensor)]
    return int(tensor.elements // block * block_bytes)


def _check_sizes(header: GgufHeader) -> None:
    """Refuse a header that describes a larger or smaller model than its tensors are, before one is made of it."""
    blocks = {found[0] for tensor in header.tensors if (found := _BLOCK.match(tensor.name))}
    _check_size(header, "block_count", len(blocks), "blocks")
    for tensor in header.tensors:
        for dimension, held in enumerate(tensor.shape):
            if key := _SIZES.get((_BLOCK.sub("", tensor.name), dimension)):
                _check_size(header, key, held, f"in dimension {dimension} of {tensor.name}")


def _check_size(header: GgufHeader, key: str, held: int, where: str) -> None:
    said = header.setting(key)
    if isinstance(said, int) and said and said != held:
        raise CheckpointError(
            f"GGUF file {str(header.path)!r} says {key} {said}, and holds {held} {where}; download it again"
        )


def _check_memory(header: GgufHeader, dtype: torch.dtype) -> None:
    largest = max(tensor.elements for tensor in header.tensors) * _FLOAT32_BYTES
    needed = unpacked_bytes(header, dtype) + _COPIES_OF_ONE_TENSOR * largest
    available = psutil.virtual_memory().available
    if needed > available:
        raise CapacityError(
            f"GGUF file {str(header.path)!r} takes {format_bytes(needed)} of memory unpacked to {dtype}, and "
            f"{format_bytes(available)} are available; use a smaller model"
        )


def _refusal(header: GgufHeader, error: Exception) -> UnsupportedError | CheckpointError:
    text = str(error)
    if "not supported yet" in text or "Cannot rebuild a config" in text:
        return UnsupportedError(
            f"GGUF file {str(header.path)!r} is of architecture {header.architecture!r}, which transformers does not "
            "read from GGUF; use the model's own checkpoint folder"
        )
    return CheckpointError(f"GGUF file {str(header.path)!r} cannot be loaded: {explain(error)}")


def _check_config(header: GgufHeader, config: PreTrainedConfig) -> None:
    """Refuse a file of which transformers ignores something that changes logits; Llama 3's RoPE is set right."""
    ropes = _ropes(config)
    readings = _readings(config, ropes)
    for key, said in header.settings.items():
        if key in readings:
            _check_reading(header, key, said, readings[key])
        elif key not in _HARMLESS and said not in _NEUTRAL.get(key, ()):
            _refuse(header, f"{key} {shown(said)}", "nothing")
    frequencies = next((tensor for tensor in header.tensors if tensor.name == _LLAMA3_FREQUENCIES), None)
    if frequencies is not None:
        config.rope_parameters = _llama3_rope(header, frequencies, ropes[0])
        return
    scaled = header.setting("rope.scaling.type") not in (None, "none") or header.setting("rope.scaling.factor") not in (
        (None, 0, 1)
    )
    if scaled and all(rope.get("rope_type", "default") == "default" for rope in ropes):
        _refuse(header, f"rope.scaling.type {header.setting('rope.scaling.type')}", "RoPE without scaling")


def _readings(config: PreTrainedConfig, ropes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each key that has a counterpart in transformers' config what stands there, by name; one is enough."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * (ropes[0].get("partial_rotary_factor") or 1))
    scale = (getattr(config, "query_pre_attn_scalar", None) or head) ** -0.5
    bases = {f"rope_theta[{index}]": rope.get("rope_theta") for index, rope in enumerate(ropes)}
    return {
        "attention.key_length": {"head_dim": head},
        "attention.scale": {"the scale": scale},
        "attention.value_length": {"head_dim": head},
        "rope.dimension_count": {"rotary dimensions": rotated},
        "rope.freq_base": bases,
        "rope.freq_base_swa": bases,
    } | {key: {name: getattr(config, name, None) for name in _present(config, names)} for key, names in _SILENT.items()}


def _check_reading(header: GgufHeader, key: str, said: Any, made: dict[str, Any]) -> None:
    is_set = isinstance(said, bool) or (isinstance(said, int | float) and said != 0)
    if is_set and not any(_equal(said, value) for value in made.values()):
        _refuse(header, f"{key} {said:g}", ", ".join(f"{name}={value}" for name, value in made.items()))


def _present(config: PreTrainedConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that a config has, or the first if it has none of them."""
    return tuple(name for name in names if hasattr(config, name)) or names[:1]


def _check_weights(header: GgufHeader, config: PreTrainedConfig) -> None:
    """Refuse a file that holds more or less than its model takes: transformers passes over what it does not know.

    The model is one without memory, so that a header that lies costs none.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    held = sum(tensor.elements for tensor in header.tensors if tensor.name != _LLAMA3_FREQUENCIES)
    weights = model.state_dict(keep_vars=True).values()
    taken = sum({id(weight): weight.numel() for weight in weights}.values())  # tied ones once
    if held != taken:
        _refuse(header, f"{held} weights", f"a model of {taken}")


def _refuse(header: GgufHeader, said: str, made: str) -> None:
    raise UnsupportedError(
        f"GGUF file {str(header.path)!r} says {said}, and transformers makes {made} of it; "
        "use the model's own checkpoint folder"
    )


def _equal(said: float, made: Any) -> bool:
    return isinstance(made, int | float) and math.isclose(said, made, rel_tol=1e-6)


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the RoPE parameters of all layer types."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _llama3_rope(header: GgufHeader, frequencies: GgufTensor, rope: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters behind the divisors of RoPE frequencies that llama.cpp keeps as a tensor.

    Every Llama 3 has the same but for the factor, which is the largest divisor; the others must then come out.
    """
    with header.path.open("rb") as file:
        file.seek(frequencies.start)
        divisors = np.frombuffer(file.read(frequencies.elements * _FLOAT32_BYTES), np.float32).astype(np.float64)
    low, high, length = _LLAMA3_ROPE.values()
    turns = length / (2 * np.pi) * rope["rope_theta"] ** (-np.arange(len(divisors)) / len(divisors))
    factor = float(divisors.max())
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        _refuse(header, f"{_LLAMA3_FREQUENCIES} that are not Llama 3's", "RoPE without scaling")
    return {**rope, "rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


def _end_tokens(header: GgufHeader, model: PreTrainedModel) -> None:
    """Let the end of a turn or a message end the output, too: transformers reads one end token only."""
    ids = [header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    found = list(dict.fromkeys(index for index in ids if isinstance(index, int)))
    if len(found) > 1:
        model.generation_config.eos_token_id = found
