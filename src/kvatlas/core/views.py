"""What a stage sees of the cache. Built by storage, read by strategies, changed by nobody.

Shapes: B sequences whose strategies are of one kind, H lanes (KV heads of whole layers, layer by layer), S slots padded
to the longest lane, D elements of a key or a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvatlas.core.vocabulary import Per

if TYPE_CHECKING:
    from torch import Tensor


def _nothing(name: str) -> Any:
    raise KeyError(f"{name!r} was not asked for")


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of a layer beside its tokens.

    Args:
        records: returns what there is one entry of per lane, [.., H, width].
        artifacts: returns what was worked out for the model's layer.
    """

    records: Callable[[str], Tensor] = _nothing
    artifacts: Callable[[str], Any] = _nothing

    def record(self, name: str) -> Tensor:
        """Return what a `Record` holds, [.., H, width]."""
        return self.records(name)

    def artifact(self, name: str) -> Any:
        """Return what an `Artifact` is for this layer."""
        return self.artifacts(name)


@dataclass(frozen=True, kw_only=True)
class TokenView(Given):
    """Tokens of which entries of streams are to be made, in lanes.

    Args:
        read: returns their keys and values: those of a chunk [H, n, D], of a step [R, H, 1, D], of m blocks [m, s, D].
    """

    read: Callable[[str], Tensor]

    def keys(self) -> Tensor:
        """Return the keys as a query meets them, rotated, float32 [.., Dk]."""
        return self.read("keys")

    def values(self) -> Tensor:
        """Return the values, float32 [.., Dv]."""
        return self.read("values")


@dataclass(frozen=True, kw_only=True)
class ChunkView(Given):
    """A chunk of a prompt: n tokens, H lanes of a layer, G query heads of each; of a step's R sequences: [R, H, ..].

    Args:
        query_HGnD: queries, rotated, float32.
        key_HnD: keys, rotated, float32.
    """

    query_HGnD: Tensor
    key_HnD: Tensor


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a decode step reads of each lane.

    Args:
        per: whether slots or blocks are named.
        index_RHn: int64, ascending; what is named beyond the count is padding.
        count_RH: int64, how many of them are meant.
    """

    per: Per
    index_RHn: Tensor
    count_RH: Tensor


@dataclass(frozen=True, kw_only=True)
class QueryView(Given):
    """What a step asks of R sequences in a layer, and what there is to choose by: H lanes, G query heads of each.

    Slots of a lane are numbered as its blocks lie: encoded ones first.

    Args:
        query_RHGD: queries, rotated.
        length_RH: int64, slots that may be read.
        newest_RH: int64, slot of the newest token; None: it has none yet, as when a stage is asked ahead.
        block_size: slots of a block.
        scale: factor of the products of queries and keys.
        seen_R: int64, tokens that each sequence has processed; the newest has position ``seen - 1``.
        prompt_R: int64, tokens up to the end of the prompt that fractions refer to.
        located: returns the positions of all slots, as `positions` does.
        sides: returns the entries of a stream in order of slots [R, H, n, width].
        entries: returns where these lie, part by part, for kernels (`kvatlas.kernels.pool.Entries`).
    """

    query_RHGD: Tensor
    length_RH: Tensor
    newest_RH: Tensor | None
    block_size: int
    scale: float
    seen_R: Tensor
    prompt_R: Tensor
    located: Callable[[], Tensor]
    sides: Callable[[str], Tensor]
    entries: Callable[[str], Sequence[Any]]

    def positions(self) -> Tensor:
        """Return the position of the token in each slot, int32 [R, H, S]; -1 where there is none."""
        return self.located()

    def side(self, name: str) -> Tensor:
        """Return the entries of a stream in order of slots [R, H, n, width]: one per slot, block, or so many slots."""
        return self.sides(name)


@dataclass(kw_only=True)
class LaneView:
    """Cached tokens of B sequences in some layers.

    Args:
        layer_H: int64, the layer of each lane.
        heads: lanes of one layer; every layer here has as many, and all of them are here.
        num_layers: layers of the model.
        positions_BHS: int32, position of the token in each slot; meaningless where not valid.
        valid_BHS: bool, whether the slot holds a token that a later query may see.
        seen_B: int64, tokens that each sequence has processed; the newest has position ``seen - 1``.
        prompt_B: int64, tokens up to the end of the prompt that fractions refer to.
        recent_B: int64, newest tokens that the strategy protects, as ``Keep.recent_tokens`` answered.
        side: returns the entries of a stream [B, H, S, width] of all slots.
        read: returns keys and values [B, H, S, D] of all slots.
        group: query heads of a lane.
        key_dim: elements of a query and of a key.
        factors: of the products of queries and keys, for each of the layers.
        softcap: what bounds these products then, as in `LayerShape`; None: nothing.
        records: returns what there is one entry of per lane, [B, H, width].
        has_read: whether keys or values were asked for.
    """

    layer_H: Tensor
    factors: Sequence[float]
    heads: int
    num_layers: int
    positions_BHS: Tensor
    valid_BHS: Tensor
    seen_B: Tensor
    prompt_B: Tensor
    recent_B: Tensor
    side: Callable[[str], Tensor]
    read: Callable[[str], Tensor]
    group: int = 1
    key_dim: int = 0
    softcap: float | None = None
    records: Callable[[str], Tensor] = _nothing
    has_read: bool = False

    @property
    def received(self) -> Tensor:
        """Attention received, float32 [B, H, S]; only a stage that needs `Received` may ask for it."""
        return self.side("received").squeeze(-1)

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of each token after those before it, float32 [B, H, S]; asked for by `Logprobs`."""
        return self.side("logprobs").squeeze(-1)

    @property
    def newest(self) -> Tensor:
        """Whether a token is among the newest that the strategy protects, bool [B, H, S]."""
        return self.positions_BHS >= (self.seen_B - self.recent_B)[:, None, None]

    def keys(self) -> Tensor:
        """Return the keys as a query meets them, rotated, float32 [B, H, S, Dk]; read when asked for."""
        self.has_read = True
        return self.read("keys")

    def values(self) -> Tensor:
        """Return the values, float32 [B, H, S, Dv]; read when asked for."""
        self.has_read = True
        return self.read("values")

    @property
    def scale(self) -> Tensor:
        """Factor of the products of queries and keys of each lane, float32 [H]."""
        return self.layer_H.float().new_tensor(self.factors).repeat_interleave(self.heads)

    def record(self, name: str) -> Tensor:
        """Return what a `Record` holds, [B, H, width]."""
        return self.records(name)

    def queries(self) -> Tensor:
        """Return the last queries, oldest first, float32 [B, H, n, G, Dk].

        The newest is at position ``seen - 1``; the first ones are 0 where fewer than n have been seen.
        """
        kept = self.record("recent_queries")
        return kept.view(*kept.shape[:-1], -1, self.group, self.key_dim)

    def query_moments(self) -> tuple[Tensor, Tensor]:
        """Return the mean [B, H, G, Dk] of all queries, and that of their products [B, H, G, Dk, Dk]; float32."""
        kept, width = self.record("query_moments"), self.key_dim
        count, sums, products = (
            kept[..., :1],
            kept[..., 1 : 1 + self.group * width],
            kept[..., 1 + self.group * width :],
        )
        lanes, count = kept.shape[:-1], count.clamp(min=1)
        mean = (sums / count).view(*lanes, self.group, width)
        return mean, (products / count).view(*lanes, self.group, width, width)

    def by_layer(self, each_BHS: Tensor) -> Tensor:
        """Return a tensor [B, H, S] as [B, L, heads, S]: layers apart from their heads."""
        sequences, lanes, slots = each_BHS.shape
        return each_BHS.view(sequences, lanes // self.heads, self.heads, slots)
