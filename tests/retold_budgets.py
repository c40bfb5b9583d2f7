"""TOVA, Knorm, Ada-KV and PyramidKV told again literally and slowly, as `tests.retold` does the others."""

from __future__ import annotations

from torch import Tensor

from kvatlas.models.attention import AttentionCall
from kvatlas.testing.retelling import Retelling, Token


class Layerwise(Retelling):
    """Forgets for all heads of a layer together, once they have attended."""

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend head by head, then look at the layer."""
        out = super().attend(call, query, key, value)
        self.after_layer(call.layer, [self.heads[call.layer, head] for head in range(key.shape[1])])
        return out

    def after_layer(self, layer: int, heads: list[list[Token]]) -> None:
        """Forget tokens of a layer."""


class Tova(Layerwise):
    """Keep the ``budget`` tokens that the last query looked at most, on average over a layer's heads."""

    def __init__(self, prompt_tokens: int, budget: int) -> None:
        super().__init__(prompt_tokens)
        self.budget = budget

    def before_attention(self, cache: list[Token]) -> None:
        """Only the query to come counts."""
        for token in cache:
            token.score = 0.0

    def after_layer(self, layer: int, heads: list[list[Token]]) -> None:
        """Drop what got least, in all heads alike."""
        if self.position < self.prompt_tokens - 1:
            return
        while len(heads[0]) > self.budget:
            means = [sum(head[i].score for head in heads) / len(heads) for i in range(len(heads[0]))]
            least = means.index(min(means))
            for head in heads:
                del head[least]


class Scored(Layerwise):
    """Cuts a prompt at its end by scores of its tokens, and afterwards lets each head hold what it was given.

    Args:
        prompt_tokens: length of the prompt.
        kept: tokens of a head, on average.
        recent: newest tokens, which stay.
        floor: of Ada-KV; None: heads are alike.
        beta: of PyramidKV; None: layers are alike.
        num_layers: of the model.
        steps: whether decode steps evict, too.
    """

    def __init__(
        self,
        prompt_tokens: int,
        kept: int,
        recent: int,
        *,
        floor: float | None = None,
        beta: int | None = None,
        num_layers: int = 2,
        steps: bool = False,
    ) -> None:
        super().__init__(prompt_tokens)
        self.kept, self.recent, self.floor, self.beta, self.num_layers = kept, recent, floor, beta, num_layers
        self.steps = steps
        self.most: dict[int, list[int]] = {}

    def scores(self, cache: list[Token]) -> list[float]:
        """Return a score for each token that may go: all but those that stay for certain, which come last or first."""
        raise NotImplementedError

    def certain(self, cache: list[Token], index: int) -> bool:
        """Whether a token stays whatever its score."""
        return cache[index].position > self.position - self.recent

    def after_layer(self, layer: int, heads: list[list[Token]]) -> None:
        """At the prompt's end divide and cut; later, if at all, hold each head to its number."""
        if self.position == self.prompt_tokens - 1:
            kept = self.of_layer(layer)
            self.most[layer] = [kept] * len(heads)
            if len(heads[0]) > kept and self.floor is not None:
                self.most[layer] = self.divided(heads, kept)
        elif self.position < self.prompt_tokens or not self.steps:
            return
        for cache, most in zip(heads, self.most[layer], strict=True):
            scores = self.scores(cache)
            order = [i for i in range(len(cache)) if not self.certain(cache, i)]
            order.sort(key=lambda i: (scores[i], cache[i].position))
            gone = set(order[: max(0, len(cache) - most)])
            cache[:] = [token for i, token in enumerate(cache) if i not in gone]

    def of_layer(self, layer: int) -> int:
        """PyramidKV: from ``most`` to ``least`` by equal steps, in tokens beside the newest."""
        if self.beta is None:
            return self.kept
        base = self.kept - self.recent
        prefix = self.prompt_tokens - self.recent
        if base >= prefix:
            return self.kept
        least = max(1, base // self.beta)
        most = base * 2 - least
        if most > prefix:
            most = prefix
            least = base * 2 - most
        return most - layer * ((most - least) // (self.num_layers - 1)) + self.recent

    def divided(self, heads: list[list[Token]], kept: int) -> list[int]:
        """Ada-KV: the best of all heads together, each head's share of them, and the floor."""
        assert self.floor is not None
        rivals, base = [], []
        for number, cache in enumerate(heads):
            scores = self.scores(cache)
            free = [i for i in range(len(cache)) if not self.certain(cache, i)]
            base.append(kept - (len(cache) - len(free)))
            rivals += [(scores[i], number) for i in free]
        best = sorted(rivals, key=lambda pair: pair[0], reverse=True)[: sum(base)]
        shares = [
            self.floor * base[number] + (1 - self.floor) * sum(winner == number for _, winner in best)
            for number in range(len(heads))
        ]
        counts = [int(share) for share in shares]
        by_rest = sorted(range(len(heads)), key=lambda n: shares[n] - counts[n], reverse=True)
        for number in by_rest[: sum(base) - sum(counts)]:
            counts[number] += 1
        return [count + kept - base[number] for number, count in enumerate(counts)]


class Knorm(Scored):
    """Keys with small norms stay, and the first ``sinks`` tokens."""

    def __init__(self, prompt_tokens: int, budget: int, sinks: int, recent: int, **options) -> None:
        super().__init__(prompt_tokens, budget, recent, **options)
        self.sinks = sinks

    def certain(self, cache: list[Token], index: int) -> bool:
        """Sinks stay, too."""
        return cache[index].position < self.sinks or super().certain(cache, index)

    def scores(self, cache: list[Token]) -> list[float]:
        """Return minus the length of each key."""
        return [-(sum(float(x) ** 2 for x in token.key) ** 0.5) for token in cache]


class Votes(Scored):
    """SnapKV's: what the last ``recent`` queries paid, averaged with the neighbours'."""

    def __init__(self, prompt_tokens: int, budget: int, window: int, pool: int, **options) -> None:
        super().__init__(prompt_tokens, budget, window, **options)
        self.reach = pool // 2

    def after_attention(self, cache: list[Token]) -> None:
        """Forget votes from outside the window."""
        if self.position < self.prompt_tokens - self.recent:
            for token in cache:
                token.score = 0.0

    def scores(self, cache: list[Token]) -> list[float]:
        """Return the pooled votes; the window itself has none."""
        own = [0.0 if self.certain(cache, i) else token.score for i, token in enumerate(cache)]
        return [sum(own[max(0, i - self.reach) : i + self.reach + 1]) for i in range(len(own))]


class Hitters(Scored):
    """H2O's: all attention ever received."""

    def __init__(self, prompt_tokens: int, heavy: int, recent: int, **options) -> None:
        super().__init__(prompt_tokens, heavy + recent, recent, steps=True, **options)

    def scores(self, cache: list[Token]) -> list[float]:
        """Return the sums."""
        return [token.score for token in cache]
