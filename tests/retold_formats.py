"""KIVI, Quest and RocketKV, told again literally and slowly; see `tests.retold`."""

from __future__ import annotations

import torch
from tests.retold import H2O, Retelling, Token
from torch import Tensor

from kvatlas.models.attention import AttentionCall

GROUP = 32


def coded(numbers: Tensor, bits: int) -> Tensor:
    """Return a group of numbers as they come back from ``bits`` bits: float16 scale and minimum, nearest code."""
    levels = 2**bits - 1
    low = numbers.min().half().float()
    step = ((numbers.max() - numbers.min()) / levels).half().float()
    if step == 0:
        return low.expand_as(numbers).clone()
    return ((numbers - low) / step).round().clamp(0, levels) * step + low


def encode(block: list[Token], bits: int) -> None:
    """Round the keys and values of 32 tokens: keys channel by channel, values token by token (arXiv:2402.02750)."""
    keys = torch.stack([token.key for token in block])
    for channel in range(keys.shape[1]):
        keys[:, channel] = coded(keys[:, channel], bits)
    for token, key in zip(block, keys, strict=True):
        token.key = key
        token.value = torch.cat([coded(part, bits) for part in token.value.split(GROUP)])


class Kivi(Retelling):
    """Tokens are stored in 16 bits, and in blocks of 32 in 2 or 4 bits when they are older than ``residual`` others.

    The prompt is one chunk, so that its own queries see it as it was computed.
    """

    def __init__(self, prompt_tokens: int, bits: int, residual: int) -> None:
        Retelling.__init__(self, prompt_tokens)
        self.bits, self.residual = bits, residual
        self.encoded: dict[int, list[list[Token]]] = {}

    def before_attention(self, cache: list[Token]) -> None:
        """Store the new token; before it, encode what is old enough."""
        newest = cache[-1]
        newest.key, newest.value = newest.key.half().float(), newest.value.half().float()
        blocks = self.encoded.setdefault(id(cache), [])
        if self.position < self.prompt_tokens:
            return
        old = {id(token) for block in blocks for token in block}
        waiting = sorted((token for token in cache[:-1] if id(token) not in old), key=lambda t: t.position)
        while len(waiting) >= self.residual + GROUP:
            block, waiting = waiting[:GROUP], waiting[GROUP:]
            encode(block, self.bits)
            blocks.append(block)


class H2OKivi(Kivi, H2O):
    """H2O over a cache that KIVI encodes: what is half empty after an eviction is merged with its like."""

    def __init__(self, prompt_tokens: int, heavy: int, recent: int, bits: int, residual: int) -> None:
        Kivi.__init__(self, prompt_tokens, bits, residual)
        self.heavy, self.recent = heavy, recent
        self.merges = 0

    def after_attention(self, cache: list[Token]) -> None:
        """Evict as H2O does; then make one block of the first two that are half empty, as long as there are two."""
        H2O.after_attention(self, cache)
        blocks, kept = self.encoded[id(cache)], {id(token) for token in cache}
        for index, block in enumerate(blocks):
            blocks[index] = [token for token in block if id(token) in kept]
        blocks[:] = [block for block in blocks if block]
        while len(half := [block for block in blocks if len(block) <= GROUP // 2]) >= 2:
            merged = half[0] + half[1]
            encode(merged, self.bits)
            blocks[:] = [merged if block is half[0] else block for block in blocks if block is not half[1]]
            self.merges += 1


class Selecting(Retelling):
    """A decode step reads some tokens of each head, the newest among them; all stay."""

    def __init__(self, prompt_tokens: int, dense: int) -> None:
        super().__init__(prompt_tokens)
        self.dense = dense
        self.chosen: list[list[int]] = []

    def choose(self, queries: Tensor, tokens: list[Token], scale: float) -> list[int]:
        """Return which tokens the query heads [G, Dk] of a KV head read, in order."""
        raise NotImplementedError

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Read some tokens of each head, and give the rest back afterwards."""
        if self.position < self.prompt_tokens or call.layer < self.dense:
            return super().attend(call, query, key, value)
        group, unread = query.shape[1] // key.shape[1], {}
        for head in range(key.shape[1]):
            cache = self.heads[call.layer, head]
            every = [*cache, Token(self.position, key[0, head, 0], value[0, head, 0])]
            read = self.choose(query[0, head * group : (head + 1) * group, 0], every, call.scale)
            self.chosen.append(read)
            unread[head] = cache[:]
            cache[:] = [every[i] for i in read if i < len(cache)]
        out = super().attend(call, query, key, value)
        for head, everything in unread.items():
            cache = self.heads[call.layer, head]
            cache[:] = [*everything, cache[-1]]
        return out


def pages_of(tokens: list[Token], size: int) -> list[list[int]]:
    """Return the tokens of each page."""
    return [list(range(i, min(i + size, len(tokens)))) for i in range(0, len(tokens), size)]


class Quest(Selecting):
    """A decode step reads the ``pages`` pages of 32 tokens with the largest bounds, the newest among them.

    arXiv:2406.10774; the query heads of a KV head share its pages, and the best of them decides.
    """

    def __init__(self, prompt_tokens: int, pages: int, dense: int) -> None:
        super().__init__(prompt_tokens, dense)
        self.pages = pages

    def choose(self, queries: Tensor, tokens: list[Token], scale: float) -> list[int]:
        """Return the tokens of the best pages."""
        pages = pages_of(tokens, GROUP)
        bounds = [self.bound(queries, [tokens[i] for i in page]) for page in pages[:-1]]
        best = sorted(range(len(bounds)), key=lambda i: bounds[i], reverse=True)[: self.pages - 1]
        return [i for page in [*sorted(best), len(pages) - 1] for i in pages[page]]

    @staticmethod
    def bound(queries: Tensor, page: list[Token]) -> float:
        """Return the largest score that a key within the page's channel-wise bounds could have with any query."""
        keys = torch.stack([token.key for token in page])
        low, high = keys.min(dim=0).values, keys.max(dim=0).values
        return max(float(torch.maximum(query * low, query * high).sum()) for query in queries)


class Rocket(Selecting):
    """A decode step reads half of ``budget``, in pages of ``page`` tokens that score best in few dimensions.

    arXiv:2502.14051, second stage: of each page the larger or the smaller bound of a channel, by the sign of the
    group's summed query; the channels where the group's queries are largest; a softmax per query head over pages,
    scaled by what of the query is seen; its mean over the group. The newest token's page is read in any case.
    """

    def __init__(self, prompt_tokens: int, budget: int, page: int, dense: int) -> None:
        super().__init__(prompt_tokens, dense)
        self.budget, self.page = budget, page

    def choose(self, queries: Tensor, tokens: list[Token], scale: float) -> list[int]:
        """Return the tokens of the best pages."""
        pages, width = pages_of(tokens, self.page), queries.shape[1]
        number = self.budget // 2 // self.page
        if len(tokens) <= number * self.page:
            return list(range(len(tokens)))
        ratio = len(tokens) / self.budget
        channels = max(1, min(width, int(width * self.page / ratio)))
        size = queries.abs().mean(dim=0).tolist()
        largest = sorted(range(width), key=lambda c: size[c], reverse=True)[:channels]
        sums = queries.sum(dim=0).tolist()
        weights = torch.zeros(len(queries), len(pages))
        for head, query in enumerate(queries):
            seen = float(query[largest].abs().sum() / query.abs().sum())
            for place, page in enumerate(pages):
                score = 0.0
                for c in largest:
                    bound = (max if sums[c] >= 0 else min)(float(tokens[i].key[c]) for i in page)
                    score += float(query[c]) * bound
                weights[head, place] = score * scale / seen**0.5
        mean = weights.softmax(dim=1).mean(dim=0).tolist()
        best = sorted(range(len(pages) - 1), key=lambda i: mean[i], reverse=True)[: number - 1]
        return [i for page in [*sorted(best), len(pages) - 1] for i in pages[page]]
