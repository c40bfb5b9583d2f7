"""The papers' methods, told again literally and slowly: one token, one layer, one head at a time.

Nothing here is shared with the engine but the model itself: its own code projects, rotates and norms, and asks the
classes below what a token's query reads. Each head owns a plain list of cached tokens.
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
    """A cached token of one KV head."""

    position: int
    key: Tensor
    value: Tensor
    score: float = 0.0


class Retelling:
    """Keeps everything; subclasses forget.

    Args:
        prompt_tokens: length of the prompt.
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
                row = [exponent / sum(exponents) for exponent in exponents]
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


class StreamingLLM(Retelling):
    """Each token sees the first ``sinks`` tokens and the newest ``recent``, itself included (arXiv:2309.17453)."""

    def __init__(self, prompt_tokens: int, sinks: int, recent: int) -> None:
        super().__init__(prompt_tokens)
        self.sinks, self.recent = sinks, recent

    def before_attention(self, cache: list[Token]) -> None:
        """Forget what is neither a sink nor recent."""
        cache[:] = [t for t in cache if t.position < self.sinks or t.position > self.position - self.recent]

    def after_attention(self, cache: list[Token]) -> None:
        """Forget the oldest that is no sink once the cache is full: the next token takes its place."""
        if len(cache) == self.sinks + self.recent:
            oldest = min((t for t in cache if t.position >= self.sinks), key=lambda t: t.position)
            cache.remove(oldest)


class H2O(Retelling):
    """Keep the newest ``recent`` tokens and the ``heavy`` others with the largest sums (arXiv:2306.14048).

    The prompt attends in full and is cut at its end; then each token's row is added, and the smallest goes.
    """

    def __init__(self, prompt_tokens: int, heavy: int, recent: int) -> None:
        super().__init__(prompt_tokens)
        self.heavy, self.recent = heavy, recent

    def after_attention(self, cache: list[Token]) -> None:
        """Drop the smallest sums outside the recent window until heavy + recent tokens are left."""
        if self.position < self.prompt_tokens - 1:
            return
        while len(cache) > self.heavy + self.recent:
            old = [token for token in cache if token.position <= self.position - self.recent]
            cache.remove(min(old, key=lambda token: token.score))


class SnapKV(Retelling):
    """At the end of the prompt, keep what its last ``window`` tokens looked at, and these (arXiv:2404.14469).

    Votes are summed over the window's queries and averaged with their neighbours', nothing beyond the ends. The output
    stays.
    """

    def __init__(self, prompt_tokens: int, budget: int, window: int, pool: int) -> None:
        super().__init__(prompt_tokens)
        self.budget, self.window, self.pool = budget, window, pool

    def after_attention(self, cache: list[Token]) -> None:
        """Forget votes from outside the window; at the end of the prompt, forget tokens."""
        if self.position < self.prompt_tokens - self.window:
            for token in cache:
                token.score = 0.0
        if self.position != self.prompt_tokens - 1 or len(cache) <= self.budget:
            return
        prefix, newest = cache[: -self.window], cache[-self.window :]
        reach = self.pool // 2
        votes = [sum(token.score for token in prefix[max(0, i - reach) : i + reach + 1]) for i in range(len(prefix))]
        ranked = sorted(range(len(prefix)), key=lambda i: votes[i], reverse=True)
        cache[:] = [prefix[i] for i in sorted(ranked[: self.budget - self.window])] + newest
