"""Write GGUF files of transformers models, as llama.cpp's converter would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = ("he", "ll", "Ġw", "or", "ld", "ĠĠ", "ĊĊ")
MERGES = ("h e", "l l", "Ġ w", "o r", "l d", "Ġ Ġ", "Ċ Ċ")
SPECIALS = ("<|end|>", "<|start|>")
SENTENCEPIECE = "sentencepiece"  # in the place of a kind of byte-level tokenizer
PIECES = ("▁", *"helowrd", "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world")


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F16",
    *,
    pre: str = "smollm",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> Path:
    """Write a llama or qwen2 model with a byte-level tokenizer; matrices in ``kind``, the rest in float32.

    Args:
        path: of the file.
        model: of transformers; every matrix has rows of a multiple of 32 elements.
        kind: ggml's name of a format.
        pre: the kind of the byte-level tokenizer, or ``SENTENCEPIECE``.
        metadata: more keys of the model's section, or others than would be written; whole keys begin with "/".
        tensors: more tensors.
        architecture: to be named instead of the model's own.
    """
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture or family)
    entries = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        **(metadata or {}),
    }
    for key, value in entries.items():
        whole = key[1:] if key.startswith("/") else f"{architecture or family}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add[type(value)](whole, value)
    _write_tokenizer(writer, config.vocab_size, pre)
    for name, weight in _renamed(model).items():
        wanted = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(weight, wanted), raw_dtype=wanted)
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(size: int) -> list[str]:
    """Return the tokens of the files: the specials, 256 bytes, a few words, and what fills up."""
    tokens = [*SPECIALS, *bytes_to_unicode().values(), *WORDS]
    assert len(tokens) <= size
    return tokens + [f"<unused{index}>" for index in range(size - len(tokens))]


def rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Round the matrices of a model in place to what ``kind`` stores, and return it."""
    wanted = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                blocks = gguf.quantize(weight.numpy(), wanted)
                weight.copy_(torch.from_numpy(np.array(gguf.dequantize(blocks, wanted))))
    return model


def _write_tokenizer(writer: gguf.GGUFWriter, size: int, pre: str) -> None:
    if pre == SENTENCEPIECE:
        _write_sentencepiece(writer, size)
        return
    tokens = vocabulary(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    writer.add_token_types(
        [control if token in SPECIALS else unused if "unused" in token else normal for token in tokens]
    )
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{% for message in messages %}<|start|>{{ message.content }}<|end|>{% endfor %}")


def _write_sentencepiece(writer: gguf.GGUFWriter, size: int) -> None:
    kinds = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    kinds |= {f"<0x{byte:02X}>": gguf.TokenType.BYTE for byte in range(256)}
    kinds |= dict.fromkeys(PIECES, gguf.TokenType.NORMAL)
    kinds |= {f"<unused{index}>": gguf.TokenType.UNUSED for index in range(size - len(kinds))}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(kinds))
    writer.add_token_types(list(kinds.values()))
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _renamed(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return the weights under llama.cpp's names, rows of a Llama's queries and keys in llama.cpp's order."""
    config = model.config
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config.model_type]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    renamed = {}
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        for part, count in heads.items() if config.model_type == "llama" else ():
            if part in key:
                halves = values.reshape(count, 2, -1, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        renamed[names.get_name(key, try_suffixes=(".weight", ".bias"))] = values
    return renamed
