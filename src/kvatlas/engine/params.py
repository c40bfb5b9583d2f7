"""What a user asks of a generation, under vLLM's parameter names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvatlas.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    Args:
        max_tokens: most tokens to generate.
        min_tokens: tokens before which neither the end token nor a stop string ends the output.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: sample among this many most likely tokens; 0 for all.
        top_p: sample among the most likely tokens that together reach this probability, in (0, 1].
        seed: makes sampling repeatable; None draws one.
        stop: strings that end the output; they are not part of it.
        stop_token_ids: tokens that end the output, beside the model's end token; they are part of it.
        ignore_eos: go on after the model's end token.

    Raises:
        ConfigError: a value is out of range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        counts = (self.max_tokens, self.min_tokens, self.top_k)
        _check(
            all(isinstance(n, int) for n in counts), f"max_tokens, min_tokens and top_k are whole numbers, got {counts}"
        )
        _check(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must be between 0 and max_tokens={self.max_tokens}, got {self.min_tokens}",
        )
        _check(0 <= self.temperature < math.inf, f"temperature must be finite and at least 0, got {self.temperature}")
        _check(self.seed is None or 0 <= self.seed < 2**63, f"seed must be in [0, 2**63), got {self.seed}")
        _check(self.top_k >= 0, f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        _check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _check(all(self.stop), "a stop string is empty; leave it out")


def _check(good: bool, message: str) -> None:
    if not good:
        raise ConfigError(message)
