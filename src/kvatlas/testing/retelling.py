"""A method told again slowly, in plain Python, to compare the engine with: one token, one layer, one head at a time.

Nothing here is shared with the engine but the model itself: its own code projects, rotates and norms, and asks a
retelling what a token's query reads. Each head owns a plain list of cached tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvatlas.models.adapter import Adapter
from kvatlas.models.attention import AttentionCall


@dataclass
class Token:
    """A cached token of one KV head.

    Args:
        position: in the sequence.
        key: as a query meets it, rotated [Dk].
        value: [Dv].
        score: attention received so far, summed over the query heads of its KV head.
    """

    position: int
    key: Tensor
    value: Tensor
    score: float = 0.0


class Retelling:
    """Keeps everything; subclasses forget.

    Args:
        prompt_tokens: length of the prompt.

    Attributes:
        position: of the token whose query reads; the last of the prompt is at ``prompt_tokens - 1``.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.position = 0
        self.heads: dict[tuple[int, int], list[Token]] = {}

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what the query of the one new token reads [1, 1, Hq, Dv]."""
        num_query_heads, num_heads = query.shape[1], key.shape[1]
        out = torch.empty(1, 1, num_query_heads, value.shape[3])
        for head in range(num_heads):
            cache = self.heads.setdefault((call.layer, head), [])
            cache.append(Token(self.position, key[0, head, 0], value[0, head, 0]))
            self.before_attention(cache)
            group = num_query_heads // num_heads
            for query_head in range(head * group, (head + 1) * group):
                exponents = [math.exp(float(query[0, query_head, 0] @ token.key) * call.scale) for token in cache]
                total = sum(exponents)
                row = [exponent / total for exponent in exponents]
                for token, probability in zip(cache, row, strict=True):
                    token.score += probability
                out[0, 0, query_head] = sum(p * token.value for p, token in zip(row, cache, strict=True))
            self.after_attention(cache)
        return out

    def before_attention(self, cache: list[Token]) -> None:
        """Forget tokens of one head that the newest may not see."""

    def after_attention(self, cache: list[Token]) -> None:
        """Forget tokens of one head that later ones may not see."""

    def run(self, adapter: Adapter, tokens: Sequence[int]) -> tuple[list[Tensor], list[list[list[int]]]]:
        """Return the logits [V] after each token from the prompt's last on, and the positions each head then holds."""
        logits, kept = [], []
        for self.position, token in enumerate(tokens):
            ids, positions = torch.tensor([token]), torch.tensor([self.position])
            row = adapter.forward(ids, positions, self, torch.tensor([0]), rope_tokens=len(tokens))[0]
            if self.position >= self.prompt_tokens - 1:
                logits.append(row)
                kept.append([[token.position for token in self.heads[key]] for key in sorted(self.heads)])
        return logits, kept
