"""Unpacked copies of GGUF files: whole or not there, whatever happened to the process or the disk."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tests.families import tiny_model
from tests.gguf_files import write_gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvatlas.models import copies
from kvatlas.models.copies import MANIFEST, load_kept
from kvatlas.models.gguf import load_gguf
from kvatlas.models.gguf_header import read_header
from kvatlas.models.loading import load_model

LOAD = """
import sys, pathlib, torch
from kvatlas.models import copies, gguf_header
copies.load_kept(gguf_header.read_header(pathlib.Path(sys.argv[1])), torch.float32)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("KVATLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KVATLAS_KEEP_GGUF", "1")
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=320), "Q8_0")


@pytest.fixture
def expected(file: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a load without a copy gives."""
    return load_gguf(read_header(file), torch.float32).state_dict()


def assert_loads(file: Path, expected: dict[str, torch.Tensor]) -> None:
    model, tokenizer = load_kept(read_header(file), torch.float32)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert tokenizer.decode(tokenizer("hello  1")["input_ids"]) == "hello  1"


def copy_in(cache: Path) -> Path:
    """Return the one copy; fails where anything else is there but its lock."""
    (copy,) = (path for path in cache.iterdir() if path.suffix != ".lock")
    assert not copy.name.startswith(".")
    return copy


@pytest.fixture
def unpackings(monkeypatch) -> list[Path]:
    """Return a list that grows by one file each time one is unpacked."""
    files: list[Path] = []
    load = copies.load_gguf
    monkeypatch.setattr(copies, "load_gguf", lambda header, dtype: files.append(header.path) or load(header, dtype))
    return files


def test_unpacked_once(cache, file, expected, unpackings, capfd, caplog):
    for _ in range(3):
        assert_loads(file, expected)
    assert unpackings == [file]
    manifest = json.loads((copy_in(cache) / MANIFEST).read_text())
    assert manifest["source"]["file"] == "tiny.gguf" and manifest["source"]["bytes"] == file.stat().st_size
    assert set(manifest["made_with"]) == {"kvatlas", "transformers", "gguf", "torch"}
    assert set(manifest["files"]) == {path.name for path in copy_in(cache).iterdir()} - {MANIFEST}
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_only_if_asked(cache, file, monkeypatch):
    monkeypatch.setenv("KVATLAS_KEEP_GGUF", "0")
    load_model(file)
    assert not cache.exists()


def test_another_file_of_the_same_name_is_another_copy(cache, file, tmp_path):
    first = load_model(file).adapter.model
    other = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", seed=1, vocab_size=320), "Q8_0")
    model = load_model(other).adapter.model
    assert not torch.equal(model.lm_head.weight, first.lm_head.weight)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000 % len(data)] ^= 1
    path.write_bytes(data)


def edit_manifest(copy: Path, **changes: object) -> None:
    (copy / MANIFEST).write_text(json.dumps({**json.loads((copy / MANIFEST).read_text()), **changes}))


DAMAGE = {
    "a bit": lambda copy: flip(copy / "model.safetensors"),
    "cut weights": lambda copy: (copy / "model.safetensors").write_bytes(b""),
    "no weights": lambda copy: (copy / "model.safetensors").unlink(),
    "tokenizer": lambda copy: flip(copy / "tokenizer.json"),
    "config": lambda copy: (copy / "config.json").write_text("{}"),
    "no manifest": lambda copy: (copy / MANIFEST).unlink(),
    "cut manifest": lambda copy: (copy / MANIFEST).write_text('{"format"'),
    "odd manifest": lambda copy: (copy / MANIFEST).write_text('{"format": 2, "source": {"sha256": null}, "files": 3}'),
    "nothing listed": lambda copy: edit_manifest(copy, files={}),
    "a list": lambda copy: (copy / MANIFEST).write_text("[]"),
    "a file": lambda copy: (shutil.rmtree(copy), copy.write_text("x")),
    "empty": lambda copy: [path.unlink() for path in copy.iterdir()],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_copies_are_made_anew(cache, file, expected, unpackings, caplog, case):
    assert_loads(file, expected)
    DAMAGE[case](copy_in(cache))
    assert_loads(file, expected)
    assert_loads(file, expected)
    assert len(unpackings) == 2, "unpacked again once, and kept"
    assert [record.message.endswith("is damaged; unpacking anew") for record in caplog.records] == [True]


@pytest.mark.parametrize("moment", ["the tokenizer", pytest.param("the renaming", marks=pytest.mark.slow)])
def test_killed_in_the_middle(cache, file, expected, moment):
    """The process ends itself right before or inside what writes a copy; nobody cleans up after it."""
    kill = {
        "the tokenizer": "import transformers; transformers.PreTrainedTokenizerBase.save_pretrained = die",
        "the renaming": "import pathlib; pathlib.Path.rename = die",
    }[moment]
    program = f"import os, signal\ndie = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n{kill}\n{LOAD}"
    done = subprocess.run([sys.executable, "-c", program, str(file)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (partial,) = (path for path in cache.iterdir() if path.is_dir())
    assert partial.name.startswith(".") and partial.suffix == ".partial"
    assert_loads(file, expected)
    assert copy_in(cache).is_dir(), "and the partial one is gone"


@pytest.mark.slow
def test_processes_that_start_at_once(cache, file, expected):
    running = [subprocess.Popen([sys.executable, "-c", LOAD, str(file)], stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=120)[1] for process in running] == [b""] * 2
    assert [process.returncode for process in running] == [0] * 2
    copy_in(cache)
    assert_loads(file, expected)


def test_a_folder_that_cannot_be_written(file, expected, tmp_path, monkeypatch, caplog):
    (tmp_path / "blocked").touch()
    monkeypatch.setenv("KVATLAS_KEEP_GGUF", "1")
    monkeypatch.setenv("KVATLAS_CACHE", str(tmp_path / "blocked" / "cache"))
    assert_loads(file, expected)
    assert len(caplog.records) == 1 and "no copy of the unpacked model is kept" in caplog.text


def test_a_copy_in_a_read_only_folder_is_read(cache, file, expected, monkeypatch, caplog):
    """Root may write anywhere, so what would write is taken away instead."""
    assert_loads(file, expected)
    for name in ("mkdir", "touch", "write_text", "rename", "unlink"):
        monkeypatch.delattr(Path, name)
    monkeypatch.delattr(copies, "_locked")
    assert_loads(file, expected)
    assert not caplog.records


def test_a_full_disk_is_seen_before(cache, file, expected, monkeypatch, caplog):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=1000))
    assert_loads(file, expected)
    assert len(caplog.records) == 1 and "1000 B are free" in caplog.text
    assert not [path for path in cache.iterdir() if path.is_dir()]


WRITERS = {
    "the weights": (PreTrainedModel, "save_pretrained"),
    "the tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
    "the manifest": (copies, "_manifest"),
}


@pytest.mark.parametrize("kind", [OSError, Exception])  # tokenizers raises the latter
@pytest.mark.parametrize("moment", ["the weights", "the tokenizer", "the manifest"])
def test_a_disk_that_fills_up_meanwhile(cache, file, expected, monkeypatch, caplog, kind, moment):
    def full(*arguments, **options):
        raise kind("No space left on device (os error 28)")

    monkeypatch.setattr(*WRITERS[moment], full)
    assert_loads(file, expected)
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("moment", ["the weights", "the tokenizer", "the manifest"])
def test_an_interrupt_leaves_no_folder(cache, file, monkeypatch, moment):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(*WRITERS[moment], interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_kept(read_header(file), torch.float32)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_other_dtypes_come_from_the_same_copy(cache, file, unpackings):
    whole = load_model(file).adapter.model.state_dict()
    for name, weight in load_model(file, dtype="bfloat16").adapter.model.state_dict().items():
        assert torch.equal(weight, whole[name].bfloat16()), name
    assert len(unpackings) == 1
