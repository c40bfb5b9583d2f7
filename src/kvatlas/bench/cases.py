"""What the engines are asked for, and what is kept of their answers.

A case is written ``4x256+64``: four prompts of 256 tokens, then 64 decode steps. Prefill and decode are told apart by
the clock of the worker: prefill ends when every sequence has its first token, and counts all prompt tokens; decode is
the steps after that moment. A case without steps measures prefill alone.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvatlas.core.errors import ConfigError

AGREE_TOKENS = 8
"""First tokens of an output that are compared: random weights leave logits so near that rounding shows after more."""
_CASE = re.compile(r"(\d+)x(\d+)\+(\d+)")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to do.

    Args:
        batch: sequences at once.
        prompt_tokens: of each.
        steps: decode steps after the first token of each.
    """

    batch: int
    prompt_tokens: int
    steps: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}+{self.steps}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Return the case that a text such as ``4x256+64`` names.

        Raises:
            ConfigError: it is none.
        """
        match = _CASE.fullmatch(text.strip())
        if match is None or not int(match[1]) or not int(match[2]):
            raise ConfigError(f"case {text!r} is not understood; write BATCHxPROMPT+STEPS, such as 4x256+64")
        return cls(batch=int(match[1]), prompt_tokens=int(match[2]), steps=int(match[3]))

    def prompts(self, vocabulary: int, repeat: int) -> list[list[int]]:
        """Return token ids, equal for all engines and new for each repeat, so that no cache knows them."""
        rng = random.Random(f"{self} {repeat}")
        return [[rng.randrange(3, vocabulary) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


STANDARD = {
    "llama-55m": "1x256+64,4x256+64,16x256+64,1x1024+0,1x8192+32,4x8192+32",
    "llama-125m": "1x256+64,4x256+64,16x256+64,1x1024+0,1x8192+32,4x8192+32",
    "llama-1b": "1x256+24,4x256+24,1x1024+0",
}
QUICK = "1x256+32,16x256+16,1x1024+0"


def cases_of(text: str | None, model: str, quick: bool) -> list[Case]:
    """Return the cases that a text lists, or those of a model."""
    if text is None:
        text = QUICK if quick else STANDARD.get(model.removeprefix("random:"), QUICK)
    return [Case.parse(part) for part in text.split(",")]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Medians over the repeats of one engine in one case; None where there is nothing to measure.

    Args:
        engine: its name.
        version: what its worker called itself.
        repeats: how many were measured.
        prefill_per_s: prompt tokens per second.
        prefill_per_cpu_s: prompt tokens per CPU second.
        decode_per_s: tokens per second after prefill.
        decode_per_cpu_s: tokens per CPU second.
        agree: sequences whose first tokens are those of the reference engine, of all compared.
    """

    engine: str
    version: str
    repeats: int
    prefill_per_s: float
    prefill_per_cpu_s: float
    decode_per_s: float | None
    decode_per_cpu_s: float | None
    agree: tuple[int, int]


def summarize(case: Case, engine: str, runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> Answer:
    """Return the medians of an engine's runs.

    Args:
        case: what was asked.
        engine: its name.
        runs: what the worker answered, one per repeat, with ``version`` and ``repeat``.
        reference: the runs of the engine whose tokens count as right.
    """
    prompt_tokens = case.batch * case.prompt_tokens
    truth = {run["repeat"]: run["tokens"] for run in reference}
    pairs = [
        (mine[:AGREE_TOKENS], right[:AGREE_TOKENS])
        for run in runs
        if run["repeat"] in truth
        for mine, right in zip(run["tokens"], truth[run["repeat"]], strict=True)
    ]
    same = sum(mine[: len(right)] == right[: len(mine)] for mine, right in pairs)
    return Answer(
        engine=engine,
        version=runs[-1]["version"],
        repeats=len(runs),
        prefill_per_s=statistics.median(prompt_tokens / run["prefill_s"] for run in runs),
        prefill_per_cpu_s=statistics.median(prompt_tokens / run["prefill_cpu_s"] for run in runs),
        decode_per_s=_decode(runs, "decode_s") if case.steps else None,
        decode_per_cpu_s=_decode(runs, "decode_cpu_s") if case.steps else None,
        agree=(same, len(pairs)),
    )


def _decode(runs: Sequence[dict[str, Any]], clock: str) -> float:
    rates: list[float] = [run["decode_tokens"] / max(run[clock], 1e-9) for run in runs]
    return statistics.median(rates)
