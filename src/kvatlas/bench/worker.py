"""One engine in a process of its own, asked over its standard input and output."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvatlas.core.errors import KvatlasError

START_S = 900.0


class WorkerError(KvatlasError):
    """A worker ended, took too long or refused; the text says which log to read."""


class Worker:
    """Starts an engine and waits until it is loaded; a context manager that ends it.

    Args:
        command: the worker script and its argument.
        environment: of the process.
        log: file for whatever it prints.

    Raises:
        WorkerError: it did not start.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            # A session of its own: Ctrl-C reaches us first, and all processes below it can be ended together.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        self._buffer = b""
        try:
            ready = self._answer(START_S)
        except BaseException:
            self.close()
            raise
        self.name: str = ready["ready"]
        self.load_s: float = ready["load_s"]

    def ask(self, prompts: Sequence[Sequence[int]], steps: int, timeout_s: float) -> dict[str, Any]:
        """Return the worker's figures for some prompts and decode steps.

        Raises:
            WorkerError: it refused, ended, or gave no answer in time; after the latter two it is closed.
        """
        assert self._process.stdin is not None
        line = json.dumps({"prompts": prompts, "steps": steps}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"it has ended; its log: {self._log}") from error
        return self._answer(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line(timeout_s))
        if "error" in answer:
            raise WorkerError(f"{answer['error']}; its log: {self._log}")
        return answer

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(timeout_s):
                    self.close()
                    raise WorkerError(f"it gave no answer in {timeout_s:.0f} s; its log: {self._log}")
                read = os.read(descriptor, 1 << 20)
                if not read:
                    self.close()
                    raise WorkerError(f"it ended with status {self._process.returncode}; its log: {self._log}")
                self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
