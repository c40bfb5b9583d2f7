"""What can be wrong with a checkpoint: its configuration, tokenizer, weights, or the place itself."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.fuzz.values import mutated, odd, odd_text, value

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 10**6, 2**31, 2**63, 10**30),
    *(0.5, -0.5, 1e300, math.nan, math.inf, "", "a", "3", "nan", "float32", "bfloat16", "int8", "llama", "gpt2"),
    *("silu", "nosuch", "\x00", "\ud800", "a" * 3000, [], [0], [None], [1, 2, 3], ["a"], [[]], {}, {"a": 1}),
    *({"rope_type": "yarn"}, {"rope_type": "dynamic", "factor": 0}),
)
_ADDED: dict[str, tuple[Any, ...]] = {
    "auto_map": (
        {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
        {"AutoModelForCausalLM": "a/b--own.M"},
    ),
    "quantization_config": (
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "nosuch"},
        {},
        [],
        {"load_in_8bit": True},
    ),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"rope_type": "longrope"}, {"type": "nosuch"}, [], 3),
    "rope_parameters": (
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "nosuch"},
        {"rope_theta": 0},
    ),
    "layer_types": (["full_attention"], ["nosuch", "nosuch"], ["sliding_attention"] * 2, "full_attention"),
    "sliding_window": (0, -1, 4, "4", 2.5),
    "torch_dtype": ("float16", "int8", "nosuch", 3),
    "architectures": (["LlamaModel"], ["nosuch"], [], None, "LlamaForCausalLM"),
    "model_type": ("gpt2", "nosuch", "bert", "t5", "mamba", "llava", "", None, 3),
    "attn_implementation": ("flash_attention_2", "nosuch"),
    "is_encoder_decoder": (True,),
    "pruned_heads": ({"0": [0]},),
    "eos_token_id": (-1, 10**9, [], [0, None], "0", 2.5),
}
_OWN_CODE = "open({marker!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


class _Opens:
    """An object whose unpickling opens a file for writing."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, data: Any) -> None:
    path.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))


def _spoil_json(rng: Random, path: Path, added: dict[str, tuple[Any, ...]]) -> None:
    if not path.exists() or rng.random() < 0.1:
        path.write_bytes(mutated(rng, path.read_bytes() if path.exists() else b"{}"))
        return
    data = _json(path)
    for _ in range(rng.choice((1, 1, 2))):
        if added and rng.random() < 0.4:
            key = rng.choice(sorted(added))
            data[key] = rng.choice(added[key])
        elif data and rng.random() < 0.1:
            del data[rng.choice(sorted(data))]
        else:
            data[rng.choice([*sorted(data), "extra"])] = rng.choice(_ODD)
    _write(path, data if rng.random() < 0.97 else rng.choice(_ODD))


def _config(rng: Random, folder: Path, marker: Path) -> None:
    (folder / "own.py").write_text(_OWN_CODE.format(marker=str(marker)))
    _spoil_json(rng, folder / "config.json", _ADDED)


def _generation(rng: Random, folder: Path, _: Path) -> None:
    ids = (-1, 10**9, 2**63, [], [0, None], "0", 2.5, [[0]], [-1], True, {"a": 0}, [1023, 1024], None, 1023)
    added = {
        "eos_token_id": ids,
        "temperature": (-1, "a", 0),
        "cache_implementation": ("static", "nosuch"),
        "bos_token_id": ids,
    }
    _spoil_json(rng, folder / "generation_config.json", added)


def _tokenizer(rng: Random, folder: Path, marker: Path) -> None:
    (folder / "own.py").write_text(_OWN_CODE.format(marker=str(marker)))
    added = {
        "auto_map": ({"AutoTokenizer": ["own.Tokenizer", None]}, {"AutoTokenizer": "own.Tokenizer"}, []),
        "tokenizer_class": ("LlamaTokenizer", "nosuch", "GPT2Tokenizer", None, 3),
        "chat_template": ("{{ raise_exception('no') }}", "{% for", "{{ 1/0 }}", 3, [], "{{ messages[9].a.b }}"),
        "eos_token": ("<|nosuch|>", None, 3, {"content": "a"}),
        "model_max_length": (-1, 0, 1e30, "a"),
        "added_tokens_decoder": ({"5000": {"content": "new"}}, {"a": 1}, []),
    }
    name = rng.choice(("tokenizer_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"))
    _spoil_json(rng, folder / name, added if name == "tokenizer_config.json" else {})


def _weights(rng: Random, folder: Path, _: Path) -> None:
    path = folder / "model.safetensors"
    kind = rng.choice(("bytes", "bytes", "tensor", "tensor", "tensor", "foreign", "gone", "index"))
    if kind == "bytes":
        data = (folder.parent / "checkpoint/model.safetensors").read_bytes()
        head = rng.random() < 0.6
        path.write_bytes(mutated(rng, data[:400]) + data[400:] if head else data[: rng.randrange(len(data))])
    elif kind == "tensor":
        _spoil_tensor(rng, folder)
    elif kind == "foreign":
        path.write_bytes(
            rng.choice(
                (b"", _LFS, b"<!DOCTYPE html>", b"PK\x03\x04", b"\x00" * 64, b"\xff" * 64, b"GGUF" + b"\x03" * 40)
            )
        )
    elif kind == "gone":
        path.unlink(missing_ok=True)
    else:
        names = list(_tensors(folder))
        target = rng.choice(("model.safetensors", "gone.safetensors", "../up.safetensors", "/etc/passwd", "", None, 3))
        _write(
            folder / "model.safetensors.index.json",
            rng.choice(({"weight_map": dict.fromkeys(names, target)}, {}, [], {"weight_map": []})),
        )
        if rng.random() < 0.7 and path.exists():
            path.rename(folder / "other.safetensors")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights as they were."""
    return {name: tensor.clone() for name, tensor in load_file(folder.parent / "checkpoint/model.safetensors").items()}


def _spoil_tensor(rng: Random, folder: Path) -> None:
    tensors = _tensors(folder)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(("nan", "inf", "drop", "extra", "shape", "dtype", "rename", "empty"))
    if kind in ("nan", "inf"):
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(kind)
    elif kind == "drop":
        del tensors[name]
    elif kind == "extra":
        tensors[rng.choice(("extra", "model.layers.9.mlp.up_proj.weight", "lm_head.weight"))] = torch.zeros(3)
    elif kind == "shape":
        tensors[name] = tensor.flatten()[: rng.randrange(1, tensor.numel())].contiguous()
    elif kind == "dtype":
        tensors[name] = tensor.to(rng.choice((torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float64)))
    elif kind == "rename":
        tensors[f"{name}{rng.choice(('x', '.', '_scale'))}"] = tensors.pop(name)
    else:
        tensors = {}
    save_file(
        tensors, folder / "model.safetensors", metadata={"format": rng.choice(("pt", "pt", "pt", "tf", "nosuch"))}
    )


def _pickle(rng: Random, folder: Path, marker: Path) -> None:
    """Weights as a pickle, good, foreign or malicious."""
    tensors = _tensors(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / "pytorch_model.bin"
    kind = rng.choice(("good", "code", "code", "bytes"))
    if kind == "code":
        path.write_bytes(pickle.dumps(_Opens(str(marker))))
        return
    torch.save(tensors, path)
    if kind == "bytes":
        path.write_bytes(mutated(rng, path.read_bytes()))


def _gguf(rng: Random, folder: Path, _: Path) -> object:
    path = folder / rng.choice(("file.gguf", "model.Q4_1.gguf", "a-00001-of-00002.gguf"))
    head = b"GGUF" + (3).to_bytes(4, "little") + (2 ** rng.choice((0, 1, 8, 40, 63))).to_bytes(8, "little") * 2
    path.write_bytes(
        rng.choice((b"", b"GGUF", b"GGML" + head, head, head + bytes(200), mutated(rng, head + bytes(300))))
    )
    return rng.choice((path, str(path)))


def _elsewhere(rng: Random, folder: Path, _: Path) -> object:
    """A source that is no folder of a checkpoint at all."""
    (folder / "empty").mkdir(exist_ok=True)
    loop = folder / "loop"
    if not loop.is_symlink():
        loop.symlink_to(loop)
    paths = (
        folder / "empty",
        folder / "gone",
        folder / "config.json",
        loop,
        folder / "model.safetensors",
        Path("/dev/null"),
    )
    if rng.random() < 0.5:
        return rng.choice((str, Path))(rng.choice(paths))
    return rng.choice(
        (value(odd(rng)), odd_text(rng), "random:nosuch", "random:", "no/such", "a" * 5000, f"{folder}\x00")
    )


SPOILERS: dict[str, Callable[[Random, Path, Path], object]] = {
    "config": _config,
    "elsewhere": _elsewhere,
    "generation": _generation,
    "gguf": _gguf,
    "pickle": _pickle,
    "tokenizer": _tokenizer,
    "weights": _weights,
}
