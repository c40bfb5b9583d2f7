"""The one checkpoint that all engines load: random weights, written once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

from kvatlas.bench.peers import PEERS, workers_folder
from kvatlas.core.errors import KvatlasError
from kvatlas.models import random


def checkpoint(model: str, folder: Path) -> Path:
    """Return the folder of a random model's safetensors, float32; another one once weights are drawn in another way."""
    drawn = hashlib.sha256(Path(random.__file__).read_bytes()).hexdigest()[:8]
    path = folder / drawn / random.random_name(model).removeprefix("random:")
    if not (path / "config.json").exists():
        partial = path.with_name(f"{path.name}.partial")
        adapter = random.random_model(model, dtype="float32", linear_weights="off").adapter
        adapter.restore()  # the saved config must not name our attention
        adapter.model.save_pretrained(partial)
        os.replace(partial, path)
    return path


def gguf(path: Path, peers: Path) -> Path:
    """Return the same weights as GGUF, beside the folder; written by OpenVINO's environment, which has the package.

    Raises:
        KvatlasError: it could not be written.
    """
    file = path.with_name(f"{path.name}.gguf")
    if not file.exists():
        command = [PEERS["openvino"].python(peers), workers_folder() / "to_gguf.py", path, file]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise KvatlasError(f"{file} could not be written: {last[0]}")
    return file


def vocabulary(path: Path) -> int:
    """Return how many token ids the checkpoint knows."""
    return int(json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def parameter_bytes(path: Path) -> int:
    """Return the bytes of the weights."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
