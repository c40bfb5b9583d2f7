"""What a stage asks to be computed or kept for it: values, told by `Stage.needs`. No torch.

What a need produces lies in a stream beside keys and values (`kvatlas.core.streams`), is written, moved, swapped and
accounted for by storage, and is read by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvatlas.core.errors import ConfigError
from kvatlas.core.shapes import LayerShape
from kvatlas.core.streams import Stream

Over = Literal["sum", "max", "below_mean"]
Heads = Literal["sum", "max", "mean"]
BELOW_MEAN = 1 - 1e-5
"""A share of the mean that counts as below it; rounding must not put equal shares there."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """Attention that cached tokens receive.

    Args:
        queries: last queries of a prompt that count; None: all.
        over: how what different queries pay is put together; ``"below_mean"``: how many of those that see a token pay
            it less than if they paid all that they see alike.
        heads: how what the query heads of a KV head pay is put together, query by query. Sums and means over queries
            are computed as they are read; for the others each probability is computed once more.
        in_decode: whether decode steps count: beside the prompt's queries where all count, else in their place.

    Raises:
        ConfigError: a sum over heads is to be compared with a mean.
    """

    queries: int | None = None
    over: Over = "sum"
    heads: Heads = "sum"
    in_decode: bool = True

    def __post_init__(self) -> None:
        if self.over == "below_mean" and self.heads == "sum":
            raise ConfigError("what heads pay together is no probability to compare; write heads='mean' or 'max'")

    @property
    def about(self) -> str:
        """What it is, for people."""
        return "attention received"

    @property
    def is_sum(self) -> bool:
        """Whether all that is paid is added up, or a mean of it, as it is read."""
        return self.over == "sum" and self.heads != "max"

    def stream(self, layer: LayerShape, dtype: str) -> Stream:
        """Return where it lies: one float32 number per slot, which begins at 0."""
        return Stream(name="received", fill=0.0)


@dataclass(frozen=True)
class Derived:
    """Numbers that `Stage.derive` makes of each token's keys and values.

    Args:
        name: of the stream.
        width: numbers of an entry, in units of ``unit``; rounded, at least one.
        unit: one number, or as many as a key or a value of a head has elements.
        dtype: their type, as torch calls it; None: that of the model's own keys, or float16 where these are integers.
        every: slots that have an entry together, which `Stage.merge` makes of those of their tokens; None: a block's.
        label: what it is, for people; empty: its name.
        later: entries are made from the end of the first prompt on, when `Stage.begin` has set what they depend on.

    Example:
        >>> from kvatlas.core.shapes import LayerShape
        >>> layer = LayerShape(num_query_heads=9, num_kv_heads=3, key_dim=64, value_dim=64)
        >>> Derived("bounds", 2, unit="key_dim", dtype="float32", every=None).stream(layer, "float16").width
        128
    """

    name: str
    width: float = 1
    unit: Literal["number", "key_dim", "value_dim"] = "number"
    dtype: str | None = "float32"
    every: int | None = 1
    label: str = ""
    later: bool = False

    @property
    def about(self) -> str:
        """What it is, for people."""
        return self.label or self.name

    def stream(self, layer: LayerShape, dtype: str) -> Stream:
        """Return where it lies in a layer whose own keys are of type ``dtype``."""
        width = _width(layer, self.width, self.unit)
        return Stream(name=self.name, width=width, dtype=self.dtype or dtype, every=self.every)


@dataclass(frozen=True)
class Record:
    """Numbers that there is one entry of per lane.

    They begin at 0. Until the first prompt is over, `Stage.observe` renews them with each of its chunks; at its end,
    before tokens are dropped, `Stage.begin` may set them once more.

    Args:
        name: of the stream.
        width: numbers, in units of ``unit``; rounded, at least one.
        unit: as in `Derived`.
        dtype: their type, as torch calls it.
        label: what it is, for people; empty: its name.
    """

    name: str
    width: float = 1
    unit: Literal["number", "key_dim", "value_dim"] = "number"
    dtype: str = "float32"
    label: str = ""

    @property
    def about(self) -> str:
        """What it is, for people."""
        return self.label or self.name

    def stream(self, layer: LayerShape) -> Stream:
        """Return where it lies."""
        width = _width(layer, self.width, self.unit)
        return Stream(name=self.name, width=width, dtype=self.dtype, fill=0.0)


@dataclass(frozen=True)
class RecentQueries:
    """The last queries of each lane's query heads, rotated, of prompts and of steps: `LaneView.queries`.

    Of layers that read another's lanes, those of the layer that owns them.

    Args:
        number: how many.
    """

    number: int

    @property
    def about(self) -> str:
        """What it is, for people."""
        return f"the last {self.number} queries"

    def stream(self, layer: LayerShape) -> Stream:
        """Return where they lie."""
        return Stream(name="recent_queries", width=self.number * layer.group * layer.key_dim, fill=0.0)


@dataclass(frozen=True)
class QueryMoments:
    """Mean and second moment of all queries so far, per query head, rotated: `LaneView.query_moments`."""

    about: str = "moments of queries"

    def stream(self, layer: LayerShape) -> Stream:
        """Return where they lie: a count, sums, and sums of products."""
        width = 1 + layer.group * layer.key_dim * (1 + layer.key_dim)
        return Stream(name="query_moments", width=width, fill=0.0)


@dataclass(frozen=True)
class Logprobs:
    """How likely each token was after those before it, its natural log-probability: `LaneView.logprobs`.

    Costs the logits of all tokens of a prompt, chunk by chunk, and of each sequence the log-probabilities of what comes
    next; both lie outside of the memory for keys and values.
    """

    about: str = "log-probabilities of tokens"

    def stream(self, layer: LayerShape, dtype: str) -> Stream:
        """Return where they lie: one float32 number per slot; 0 for the first token, which nothing is before."""
        return Stream(name="logprobs", fill=0.0)


@dataclass(frozen=True)
class LayerInputs:
    """The hidden states that enter each layer, from which those of the next are foreseen."""

    about: str = "layer inputs"


@dataclass(frozen=True)
class Artifact:
    """Something worked out once for a model, one thing per layer, by a function of a loaded model.

    Args:
        name: what it is called.
        build: ``"module:function"`` that works it out of a loaded model.
        about: what it is, for people.
    """

    name: str
    build: str
    about: str


Need = Received | Derived | Record | RecentQueries | QueryMoments | Logprobs | LayerInputs | Artifact


def _width(layer: LayerShape, width: float, unit: str) -> int:
    return max(1, round(width * (1 if unit == "number" else getattr(layer, unit))))
