"""What `kvatlas bench engine` and its workers say to each other, and how a worker measures.

A worker is one engine with one model in one process, started with a JSON object as its only argument:
``{"model": folder, "threads": n, "kv_gib": n, "max_tokens": longest sequence, "options": {...}}``. It answers
``{"ready": ..., "load_s": ...}``, then one line per request line ``{"prompts": [[id, ...], ...], "steps": n}``; errors
are ``{"error": text}``. Whatever a library prints goes to the standard error. Runs with the standard library alone.

Measured is what `Meter` sees after each step of the engine: the first span ends when every sequence has its first
token (prefill), the second when every sequence has ``steps`` more (decode). Sequences that got their first token early
decode meanwhile; those tokens belong to no span of decoding.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

SHOWN_TOKENS = 16
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Meter:
    """Notes wall and CPU seconds whenever tokens came out.

    Args:
        batch: sequences.
        steps: tokens that each sequence decodes after its first.
    """

    def __init__(self, batch: int, steps: int) -> None:
        self.steps = steps
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self._notes: list[tuple[float, float, int]] = []
        self._first: int | None = None
        self._base = [0] * batch
        self._note()

    def add(self, sequence: int, tokens: Sequence[int]) -> None:
        """Take new tokens of a sequence; `step` then notes the time."""
        self.tokens[sequence] += tokens

    def step(self) -> bool:
        """Note a step of the engine; return whether all sequences have decoded enough."""
        self._note()
        counts = [len(tokens) for tokens in self.tokens]
        if self._first is None:
            if min(counts) == 0:
                return False
            self._first, self._base = len(self._notes) - 1, counts
        return all(count - base >= self.steps for count, base in zip(counts, self._base, strict=True))

    def answer(self) -> dict[str, Any]:
        """Return the figures of a finished request line."""
        assert self._first is not None
        begin, first, last = self._notes[0], self._notes[self._first], self._notes[-1]
        walls = [note[0] for note in self._notes[self._first :]]
        return {
            "prefill_s": first[0] - begin[0],
            "prefill_cpu_s": first[1] - begin[1],
            "decode_s": last[0] - first[0],
            "decode_cpu_s": last[1] - first[1],
            "decode_tokens": last[2] - first[2],
            "step_s": [round(after - before, 6) for before, after in pairwise(walls)],
            "tokens": [tokens[:SHOWN_TOKENS] for tokens in self.tokens],
        }

    def most_tokens(self, prompt_tokens: int) -> int:
        """Return how many tokens to ask for: the first sequence decodes while others are in their prompts."""
        return self.steps + 1 + (len(self.tokens) - 1) * (prompt_tokens // 64 + 1)

    def _note(self) -> None:
        self._notes.append((time.perf_counter(), cpu_seconds(), sum(len(tokens) for tokens in self.tokens)))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and all below it; those of children in ticks of 10 ms."""
    return time.process_time() + sum(_ticks(child) for child in _descendants(os.getpid())) * _TICK_S


def _descendants(process: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children += map(int, task.read_text().split())
        except OSError:  # the thread has ended
            continue
    return children + [below for child in children for below in _descendants(child)]


def _ticks(process: int) -> int:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0
    return int(fields[11]) + int(fields[12])


Run = Callable[[list[list[int]], Meter], None]


def serve(load: Callable[[dict[str, Any]], tuple[str, Run]]) -> None:
    """Load the engine, then answer until the standard input ends.

    Args:
        load: takes the settings and returns what the engine is called, version included, and a function that runs
            prompts to the end that a meter tells.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    begun = time.perf_counter()
    try:
        name, run = load(json.loads(sys.argv[1]))
    except BaseException as error:
        traceback.print_exc()
        say(error=_told(error))
        sys.stderr.flush()
        os._exit(1)
    say(ready=name, load_s=time.perf_counter() - begun)
    for line in sys.stdin:
        asked = json.loads(line)
        meter = Meter(len(asked["prompts"]), asked["steps"])
        try:
            run(asked["prompts"], meter)
            say(**meter.answer())
        except Exception as error:
            traceback.print_exc()
            say(error=_told(error))
    os._exit(0)  # engines with threads of their own take their time to go


def _end_with(parent: int) -> None:
    """End this process when its parent has gone, even in the middle of a run."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
