"""The papers' methods, told again literally and slowly: one token, one layer, one head at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvatlas.models.adapter import Adapter
from kvatlas.models.attention import AttentionCall
from kvatlas.testing.retelling import Retelling, Token


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

    Votes are summed over the window's queries and averaged with their neighbours', nothing beyond the ends, or the
    greatest of them is taken; of equal votes the newer token's count more.
    """

    def __init__(self, prompt_tokens: int, budget: int, window: int, pool: int, together: Any = sum) -> None:
        super().__init__(prompt_tokens)
        self.budget, self.window, self.pool, self.together = budget, window, pool, together

    def after_attention(self, cache: list[Token]) -> None:
        """Forget votes from outside the window; at the end of the prompt, forget tokens."""
        if self.position < self.prompt_tokens - self.window:
            for token in cache:
                token.score = 0.0
        if self.position != self.prompt_tokens - 1 or len(cache) <= self.budget:
            return
        prefix, newest = cache[: -self.window], cache[-self.window :]
        reach = self.pool // 2
        votes = [
            self.together([t.score for t in prefix[max(0, i - reach) : i + reach + 1]]) for i in range(len(prefix))
        ]
        ranked = sorted(range(len(prefix)), key=lambda i: (votes[i], i), reverse=True)
        cache[:] = [prefix[i] for i in sorted(ranked[: self.budget - self.window])] + newest


class ByLayer(Retelling):
    """Each layer is told by a re-telling of its own, and all of them by one text."""

    def __init__(self, prompt_tokens: int, layers: Sequence[Retelling]) -> None:
        super().__init__(prompt_tokens)
        self.layers = layers

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Ask the layer's own; what it keeps is kept here."""
        own = self.layers[call.layer]
        own.position = self.position
        out = own.attend(call, query, key, value)
        self.heads |= own.heads
        return out


class InfiniGen(Retelling):
    """Each decode step reads, of every later layer, the tokens that its input one layer earlier makes likely.

    arXiv:2406.19707, for Llama: the query is made by hand, from the attention input of the layer before, by the next
    layer's projection and the rotation by position. ``chosen`` says per step, layer and KV head which positions were
    read beside the new token; ``recalls`` and ``masses`` say how good the guess was, step by step and layer by layer.

    Args:
        prompt_tokens: length of the prompt.
        model: a Llama of transformers.
        matrices: per layer an orthogonal matrix for each KV head [H, Dk, Dk].
        alpha: how far below a query head's best a token still counts.
        cap: most tokens read, as a fraction of those cached.
        partial_share: columns scored, as a fraction.
        dense: first layers that read everything.
    """

    def __init__(
        self,
        prompt_tokens: int,
        model: Any,
        matrices: Sequence[Tensor],
        alpha: float,
        cap: float,
        partial_share: float,
        dense: int = 1,
    ) -> None:
        super().__init__(prompt_tokens)
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.matrices = matrices
        self.alpha, self.cap, self.dense = alpha, cap, dense
        self.width = max(1, round(partial_share * matrices[0].shape[-1]))
        self.weight: dict[tuple[int, int], Tensor] = {}
        self.columns: dict[tuple[int, int], list[int]] = {}
        self.next: dict[int, dict[int, list[int]]] = {}
        self.chosen: list[dict[int, dict[int, list[int]]]] = []
        self.counts: list[int] = []
        self.recalls: list[float] = []
        self.masses: list[float] = []

    def run(self, adapter: Adapter, tokens: Sequence[int]) -> tuple[list[Tensor], list[list[list[int]]]]:
        """As for the others, with an eye on the input of each attention layer."""
        hooks = [
            module.register_forward_pre_hook(partial(self._look, index), with_kwargs=True)
            for index, module in enumerate(self.layers)
        ]
        try:
            return super().run(adapter, tokens)
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, index: int, _: nn.Module, __: object, inputs: dict[str, Any]) -> None:
        if index == 0 and self.position >= self.prompt_tokens:
            self.chosen.append({})
        target = index + 1
        if self.position < self.prompt_tokens or target >= len(self.layers) or target < self.dense:
            return
        module, (cos, sin) = self.layers[target], inputs["position_embeddings"]
        query = module.q_proj(inputs["hidden_states"][0, 0]).view(-1, module.head_dim)
        half = module.head_dim // 2
        turned = torch.cat([-query[:, half:], query[:, :half]], dim=-1)
        self._choose(target, query * cos[0, 0] + turned * sin[0, 0], module.scaling)

    def _choose(self, layer: int, query: Tensor, scale: float) -> None:
        heads = [head for index, head in sorted(self.heads) if index == layer]
        group, cached = len(query) // len(heads), len(self.heads[layer, 0])
        below: dict[int, list[list[float]]] = {head: [] for head in heads}
        for head in heads:
            matrix, columns = self.matrices[layer][head], self.columns[layer, head]
            for query_head in range(head * group, (head + 1) * group):
                rotated = query[query_head] @ matrix
                scores = []
                for token in self.heads[layer, head]:
                    key = token.key @ matrix
                    scores.append(scale * sum(float(rotated[c] * key[c]) for c in columns))
                below[head].append([score - max(scores) for score in scores])
        important = [sum(score > -self.alpha for score in row) for head in heads for row in below[head]]
        count = math.ceil(sum(important) / len(important))
        favourites = max(len({row.index(max(row)) for row in below[head]}) for head in heads)
        count = max(min(count, math.ceil(self.cap * cached - 1e-9)), favourites)
        self.counts.append(count)
        for head in heads:
            self.chosen[-1].setdefault(layer, {})[head] = sorted(self._best(below[head])[:count])

    @staticmethod
    def _best(below: list[list[float]]) -> list[int]:
        """Return the places of a lane, each query head's favourite first, then by the head that likes them best."""
        favourites = {row.index(max(row)) for row in below}
        order = [(place in favourites, max(row[place] for row in below)) for place in range(len(below[0]))]
        return sorted(range(len(order)), key=order.__getitem__, reverse=True)

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Read everything in the prompt and in dense layers, else what was chosen and the new token."""
        num_heads = key.shape[1]
        group = query.shape[1] // num_heads
        out = torch.empty(1, 1, query.shape[1], value.shape[3])
        chosen = self.chosen[-1].get(call.layer) if self.position >= self.prompt_tokens else None
        hits, masses = 0, []
        for head in range(num_heads):
            cache = self.heads.setdefault((call.layer, head), [])
            cache.append(Token(self.position, key[0, head, 0], value[0, head, 0]))
            queries = query[0, head * group : (head + 1) * group, 0]
            read = range(len(cache)) if chosen is None else [*chosen[head], len(cache) - 1]
            exact = [[float(row @ token.key) * call.scale for token in cache] for row in queries]
            for offset, scores in enumerate(exact):
                total = sum(math.exp(scores[place]) for place in read)
                out[0, 0, head * group + offset] = sum(math.exp(scores[p]) / total * cache[p].value for p in read)
                masses.append(total / sum(map(math.exp, scores)))
            if self.position < self.prompt_tokens:
                self._weigh(call.layer, head, queries, key[0, head, 0])
            elif chosen is not None:
                below = [[score - max(row[:-1]) for score in row[:-1]] for row in exact]
                hits += len(set(self._best(below)[: len(chosen[head])]) & set(chosen[head]))
        if chosen is not None:
            self.recalls.append(hits / sum(map(len, chosen.values())))
            self.masses.append(sum(masses) / len(masses))
        return out

    def _weigh(self, layer: int, head: int, queries: Tensor, key: Tensor) -> None:
        """Add up how much each rotated column weighs; after the prompt's last token, choose the heaviest."""
        weight = (torch.cat([queries, key[None]]) @ self.matrices[layer][head]).abs().sum(dim=0)
        self.weight[layer, head] = weight + self.weight.get((layer, head), torch.zeros(()))
        if self.position == self.prompt_tokens - 1:
            ranked = sorted(range(len(weight)), key=lambda c: float(self.weight[layer, head][c]), reverse=True)
            self.columns[layer, head] = ranked[: self.width]
