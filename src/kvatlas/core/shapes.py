"""What the cache must know of a model: one entry per attention layer, no torch.

A *lane* is a stream of keys and values that is stored and evicted on its own: here one KV head of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One attention layer.

    Args:
        num_query_heads: query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: KV heads; each is a lane.
        key_dim: elements of one key of one head.
        value_dim: elements of one value of one head; differs from ``key_dim`` for expanded MLA.
        window: a query at position p sees positions > p - window; None for full attention.
        shares_kv_with: index of the earlier layer whose keys and values this one reads, or None.
        scale: factor of the products of queries and keys; None: that of a plain layer, ``key_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; None: they stay.
    """

    num_query_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    shares_kv_with: int | None = None
    scale: float | None = None
    softcap: float | None = None

    @property
    def factor(self) -> float:
        """Factor of the products of queries and keys."""
        return self.key_dim**-0.5 if self.scale is None else self.scale

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_query_heads // self.num_kv_heads


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as the cache sees it.

    Args:
        name: what reports call the model.
        layers: one entry per attention layer, in order of execution.
        hidden_size: width of the residual stream, elements.
        vocab_size: number of token ids.
        max_positions: longest context the model was made for, tokens.
        num_parameters: weights, elements.
    """

    name: str
    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_parameters: int

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """Indices of the layers that own lanes, that is, do not share another layer's."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.shares_kv_with is None)

    @cached_property
    def largest_group(self) -> int:
        """Most query heads that read one lane in a layer."""
        return max(layer.group for layer in self.layers)

    @cached_property
    def num_lanes(self) -> int:
        """Number of lanes of one sequence."""
        return sum(self.layers[i].num_kv_heads for i in self.owners)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Return the bytes of the keys and values of one token over all lanes, no window applied."""
        elements = sum(
            self.layers[i].num_kv_heads * (self.layers[i].key_dim + self.layers[i].value_dim) for i in self.owners
        )
        return elements * element_bytes
