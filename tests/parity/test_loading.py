"""Checkpoints load as they are or not at all, and every refusal says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families import tiny_model

from kvatlas.core.errors import CheckpointError, ConfigError, KvatlasError, UnknownNameError, UnsupportedError
from kvatlas.models import loading, precision
from kvatlas.models.loading import BUNDLED_DIR, load_model
from kvatlas.models.precision import resolve_device, resolve_dtype
from kvatlas.models.random import SIZES, random_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(folder: Path, name: str, value: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights[name]
    if value is not None:
        weights[name] = value
    save_file(weights, path, metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "truncated": (_truncate, "truncated or corrupt"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or corrupt"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "missing key": (lambda f: _edit_weights(f, UP, None), f"1 weights are missing, first {UP}"),
    "wrong shape": (lambda f: _edit_weights(f, UP, torch.zeros(3, 64)), "another shape"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad json": (lambda f: (f / "config.json").write_text('{"a":'), "cannot be read"),
    "not a dict": (lambda f: (f / "config.json").write_text("[]"), "names no model_type"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
    "unknown type": (lambda f: _edit_config(f, model_type="foo"), "foo"),
    "not causal": (lambda f: _edit_config(f, model_type="vit"), "not a causal language model"),
    "wrong value": (lambda f: _edit_config(f, hidden_size="wide"), "hidden_size"),
    "zero heads": (lambda f: _edit_config(f, num_attention_heads=0), "cannot be loaded"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(checkpoint, case):
    damage, message = BROKEN[case]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(checkpoint)
    assert "\n" not in str(error.value) and str(checkpoint) in str(error.value)


@pytest.fixture
def float32_is_fastest(monkeypatch):
    """Say what the trial would: it is close where a processor has products of bfloat16."""
    monkeypatch.setattr(precision, "fastest_on_cpu", lambda: precision.CpuChoice(dtype=torch.float32, why="a test"))


def test_a_folder_loads(checkpoint, capfd, float32_is_fastest):
    loaded = load_model(str(checkpoint))
    assert (loaded.name, loaded.tokenizer) == ("tiny-llama", None)
    assert loaded.adapter.dtype == torch.float32, "auto is float32 on the CPU, whatever the checkpoint holds"
    assert loaded.adapter.shape.name == "tiny-llama"
    assert load_model(checkpoint, dtype="bfloat16").adapter.dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")


def test_unsupported_family(tmp_path):
    from tests.parity.test_families import _tiny_clone

    _tiny_clone("diffllama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"diffllama.*twice"):
        load_model(tmp_path)


def test_places_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model("./nowhere/at/all")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not a folder"):
        load_model(tmp_path / "file")


def test_devices_and_dtypes(monkeypatch, float32_is_fastest):
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    for dtype, device, error, message in (
        ("int8", "cpu", ConfigError, "unknown dtype 'int8'"),
        ("auto", "tpu", ConfigError, "unknown device 'tpu'"),
        ("float16", "cpu", UnsupportedError, "overflows"),
    ):
        with pytest.raises(error, match=message):
            resolve_dtype(dtype, device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu" and resolve_dtype("auto", "auto") == torch.float32
    with pytest.raises(UnsupportedError, match="finds no CUDA device"):
        resolve_dtype("auto", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_dtype("auto", "cuda") is resolve_dtype("auto", "auto") is None and resolve_device("auto") == "cuda"
    with pytest.raises(UnsupportedError, match="torch finds 1"):
        resolve_dtype("auto", "cuda:3")


def test_random_models():
    state = torch.get_rng_state()
    loaded = load_model("random:llama-mini")
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.name, loaded.tokenizer) == ("random:llama-mini", None)
    layer = loaded.adapter.shape.layers[0]
    assert (layer.num_query_heads, layer.num_kv_heads, layer.key_dim) == (8, 2, 128)
    again = random_model("llama-mini").adapter.model.state_dict()
    for name, weight in loaded.adapter.model.state_dict().items():
        assert torch.equal(weight, again[name])
    with pytest.raises(UnknownNameError, match="llama-100m"):
        load_model("random:llama-7b")


@pytest.mark.parametrize("name", [name for name in SIZES if name[-1] in "mb"])
def test_random_sizes_match_their_names(name):
    from transformers import LlamaForCausalLM

    from kvatlas.models.random import _config

    with torch.device("meta"):
        model = LlamaForCausalLM(_config(SIZES[name]))
    count = sum(weight.numel() for weight in model.parameters())
    number, unit = float(name[6:-1]), {"m": 1e6, "b": 1e9}[name[-1]]
    assert abs(count / (number * unit) - 1) < 0.1


def test_bundled_model(monkeypatch, tmp_path):
    if (BUNDLED_DIR / "config.json").exists():
        assert load_model(None).name == "bundled"
    monkeypatch.setattr(loading, "BUNDLED_DIR", tmp_path)
    with pytest.raises(KvatlasError, match=r"no config\.json"):
        load_model(None)
