"""What a checkpoint brings along besides weights: code, pickles, NaN; and who loads at the same time."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families import tiny_model
from tests.unit.cli.running import kvatlas

from kvatlas.core.errors import CheckpointError, ConfigError, UnsupportedError
from kvatlas.models import checkpoint
from kvatlas.models.loading import BUNDLED_DIR, load_model

CODE = """
from pathlib import Path
Path("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
def generate(model, *arguments, **options): Path("ran").touch()
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Return a copy of the bundled model with code beside it; a question to the user finds a "y"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    copy = shutil.copytree(BUNDLED_DIR, tmp_path / "model")
    (copy / "own.py").write_text(CODE)
    return copy


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ran() -> bool:
    return Path("ran").exists()


def test_a_family_that_only_its_code_knows_is_refused(folder):
    edit(folder / "config.json", model_type="own", auto_map=AUTO_MAP)
    with pytest.raises(UnsupportedError, match=r"model .* needs code of its own, which kvatlas does not run") as error:
        load_model(folder)
    assert "\n" not in str(error.value) and not ran()
    assert "needs code of its own" in kvatlas("generate", "hi", "--model", folder).error
    assert not ran()


def test_a_model_class_that_only_its_code_has_is_refused(folder):
    edit(folder / "config.json", model_type="vit", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    with pytest.raises(UnsupportedError, match="needs code of its own"):
        load_model(folder)
    assert not ran()


def test_a_tokenizer_that_only_its_code_knows_is_not_run(folder):
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    edit(folder / "tokenizer_config.json", **settings)
    with pytest.raises(UnsupportedError, match=r"the tokenizer of '.*' needs code of its own"):
        load_model(folder)
    assert not ran()


def test_where_transformers_has_the_family_the_code_beside_it_is_not_run(folder):
    edit(folder / "config.json", auto_map=AUTO_MAP)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    loaded = load_model(folder).adapter.model
    assert type(loaded).__module__.startswith("transformers.")
    assert not ran()


class Malice:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_pickled_weights_are_data_only(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = load_model(folder).adapter.model.state_dict()
    assert all(torch.equal(loaded[name], weight.to(loaded[name].dtype)) for name, weight in weights.items())
    torch.save({**weights, "more": Malice()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and not ran()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(CheckpointError):
        load_model(folder)
    assert not ran()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name][3, 5] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"weight {name} holds NaN or infinity; download it again"):
        load_model(tmp_path, dtype=dtype)


def test_large_weights_are_numbers():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.finfo(torch.float32).max)  # whose sum is infinite
    checkpoint.check_finite(model, "large")


def test_threads_that_load_at_once_do_not_harm_each_other():
    sources = [None, "random:llama-mini", None, None]
    alone = [load_model(source).adapter.model.state_dict() for source in sources]
    for _ in range(2):
        with ThreadPoolExecutor(len(sources)) as pool:
            models = [loaded.adapter.model for loaded in pool.map(load_model, sources)]
        later = load_model(None).adapter.model
        for model, expected in zip([*models, later], [*alone, alone[0]], strict=True):
            assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
            found = model.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert torch.get_default_dtype() == torch.float32


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, capfd):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def unreachable(*arguments, **options):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(CheckpointError, match=r"model 'who/what' .*not in the hub's cache.*; give a folder") as error:
        load_model("who/what")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_configuration_far_beyond_the_weights_is_refused_before_they_are_drawn(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 10**7}))
    with pytest.raises(CheckpointError, match=r"config.json describes [\d,]+ weights, the files have [\d,]+ bytes"):
        load_model(tmp_path)


@pytest.mark.parametrize("source", ["a" * 5000, "a\x00b", "~nobody/here", 3.0, b"folder", ["folder"]], ids=str)
def test_what_is_no_model_is_refused_by_name(source: object) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as raised:
        load_model(source)  # type: ignore[arg-type]
    assert len(str(raised.value)) < 400 and str(raised.value).isprintable()


def test_a_tokenizer_that_loads_and_cannot_run(tmp_path: Path) -> None:
    for file in BUNDLED_DIR.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "a"}))
    with pytest.raises(CheckpointError, match="the tokenizer of"):
        load_model(tmp_path)
