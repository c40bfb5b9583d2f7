"""What a stage is: a frozen value that looks and answers. Storage acts.

A stage file holds no device code and no hooks, and mutates nothing. It declares what it needs computed for it, how many
tokens a lane holds under it, and what holds of it (`Traits`).
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from kvatlas.core.errors import ConfigError
from kvatlas.core.grammar import StageCall, Value, format_value
from kvatlas.core.names import unknown_name
from kvatlas.core.needs import Need, Received
from kvatlas.core.plan import NOTHING, Traits
from kvatlas.core.vocabulary import Axis, Format, Moment, Per, Saves, Tier

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import ChunkView, LaneView, QueryView, Selection, TokenView


_MOST = 2**31 - 1
"""Positions are 32-bit numbers."""


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """Facts about a stage that tables and checks read.

    Args:
        summary: one line for users.
        paper: where the method comes from.
        saves: what it lowers.
        traits: what holds of it.
    """

    summary: str
    paper: str
    saves: tuple[Saves, ...] = ()
    traits: Traits = NOTHING


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of all stages; subclasses are frozen dataclasses whose fields are the parameters users write.

    Args:
        layers: the layers it is for, such as ``"0-1"``, ``"2-"`` or ``5``, counted from 0; None: all.

    Attributes:
        sizes: names of parameters that only sizes follow from, so that requests that differ in them share calls; what
            `derive` and `observe` return must not depend on them.
        also: names of parameters that stand for others, which are kept in their place.

    Raises:
        ConfigError: a parameter has the wrong type, or is a whole number that no tensor of tokens could have.
    """

    name: ClassVar[str]
    axis: ClassVar[Axis]
    info: ClassVar[StageInfo]
    sizes: ClassVar[frozenset[str]] = frozenset()
    also: ClassVar[frozenset[str]] = frozenset()

    layers: str | int | None = None

    def __post_init__(self) -> None:
        """Check types; subclasses that check ranges call this first."""
        kind: Any = type(self)  # mypy takes the hash of a class for that of its values
        hints = _hints(kind)
        for field in dataclasses.fields(self):
            value = _coerce(self.name, field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        first, last = _span(self.name, self.layers)
        object.__setattr__(self, "_span", (first, last))
        if self.layers is not None:  # one spelling for one meaning
            until = "" if last == float("inf") else int(last)
            object.__setattr__(self, "layers", first if first == last else f"{first}-{until}")

    @classmethod
    def parameters(cls) -> list[dataclasses.Field[Any]]:
        """Return the stage's own parameters, in order; ``layers``, which all have, left out."""
        return [field for field in dataclasses.fields(cls) if field.name != "layers"]

    @classmethod
    def from_call(cls, call: StageCall) -> Stage:
        """Return the stage that a parsed call describes.

        Raises:
            ConfigError: a parameter is unknown, given twice, of the wrong type or out of range.
        """
        names = [field.name for field in cls.parameters()]
        if len(call.positional) > len(names):
            raise ConfigError(f"{cls.name} takes {len(names)} parameter(s), got {len(call.positional)}: {call}")
        given = dict(zip(names, call.positional, strict=False))
        for key, value in call.named:
            if key not in names and key != "layers" and key not in cls.also:
                raise unknown_name(f"parameter of {cls.name}", key, [*names, *cls.also, "layers"])
            if key in given:
                raise ConfigError(f"parameter {key!r} of {cls.name} is given twice: {call}")
            given[key] = value
        return cls(**given)  # type: ignore[arg-type]  # checked by __post_init__

    def covers(self, layer: int) -> bool:
        """Whether it is for a layer."""
        first, last = self._layer_span
        return first <= layer <= last

    @property
    def first_layer(self) -> int:
        """First layer that it is for."""
        return self._layer_span[0]

    def overlaps(self, other: Stage) -> bool:
        """Whether there may be a layer that both are for."""
        (first, last), (begin, end) = self._layer_span, other._layer_span
        return first <= end and begin <= last

    @property
    def _layer_span(self) -> tuple[int, float]:
        span: tuple[int, float] = self.__dict__["_span"]
        return span

    @property
    def kind(self) -> tuple[object, ...]:
        """What two stages must have in common to act in one call: all but their sizes; 1 is not 1.0 here."""
        fixed = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.sizes]
        return (type(self), *((type(value), value) for value in fixed))

    @property
    def moments(self) -> frozenset[Moment]:
        """When it acts."""
        return frozenset()

    @property
    def needs(self) -> tuple[Need, ...]:
        """What must be computed or kept for it."""
        return ()

    def derive(self, name: str, tokens: TokenView) -> Tensor:
        """Return the entry [.., width] of each token [..] in the stream of a `Derived`."""
        raise NotImplementedError(f"{self.name} needs {name!r} to be derived and does not say how; override 'derive'")

    def observe(self, name: str, chunk: ChunkView) -> Tensor:
        """Return what a `Record` [H, width] is after a further chunk of the first prompt: by default, what it was."""
        return chunk.record(name)

    def begin(self, prompt: TokenView) -> Mapping[str, Tensor]:
        """Return records [H, width] to set at the end of the first prompt: by default, none.

        They may follow from what was observed, and from the keys and values of the whole prompt [H, n, D], which are
        read only if asked for.
        """
        return {}

    def merge(self, name: str, one: Tensor, other: Tensor) -> Tensor:
        """Return the entry [.., width] of all tokens of two entries, where a block has one."""
        raise NotImplementedError(f"{self.name} keeps {name!r} per block and does not say how; override 'merge'")

    def sized(self, fraction: float) -> Stage | None:
        """Return it with what it keeps of a prompt, or reads per step, set to a fraction; None: it has no size."""
        return None

    def conflict(self, other: Stage) -> str | None:
        """Return why this stage cannot work together with ``other``, or None."""
        return None

    def lacks(self, others: Collection[Stage]) -> str | None:
        """Return what this stage needs beside it and does not find among ``others``, or None."""
        return None

    def __str__(self) -> str:
        fields = [*self.parameters(), *(f for f in dataclasses.fields(self) if f.name == "layers")]
        values = [(f.name, getattr(self, f.name)) for f in fields]
        pairs = [f"{name}={format_value(value)}" for name, value in values if value is not None]
        return f"{self.name}({', '.join(pairs)})" if pairs else self.name


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a prompt query may see: the first ``sinks`` tokens and the last ``recent``, itself included."""

    sinks: int
    recent: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many tokens a lane holds.

    Args:
        after_prompt: most that survive the end of a prompt; None: all.
        high: a lane that holds so many after a step is cut; None: none is.
        low: to so many; one less than ``high`` lets the next token take the evicted one's slot.
    """

    after_prompt: int | None = None
    high: int | None = None
    low: int | None = None

    def __post_init__(self) -> None:
        if self.high is not None and (self.after_prompt is None or self.low is None):
            raise ConfigError("a lane that is cut at a high mark says how many tokens it holds after a prompt, and low")

    @classmethod
    def steady(cls, tokens: int) -> Limits:
        """Return the limits of a lane that never holds more than ``tokens`` between steps."""
        return cls(after_prompt=tokens, high=tokens + 1, low=tokens)

    def resized(self, after_prompt: int) -> Limits:
        """Return them for another share of what is kept after a prompt."""
        if self.after_prompt is None:
            return self
        more = after_prompt - self.after_prompt
        return Limits(
            after_prompt=after_prompt,
            high=None if self.high is None else self.high + more,
            low=None if self.low is None else self.low + more,
        )


@dataclass(frozen=True, kw_only=True)
class Keep(Stage):
    """Axis *keep*: which tokens stay.

    Attributes:
        streams: a prompt may be cut between its chunks.
    """

    axis: ClassVar[Axis] = Axis.KEEP
    streams: ClassVar[bool] = False

    def sized(self, fraction: float) -> Stage | None:
        """Return it with another ``budget``, where it has such a parameter; None: it has none."""
        if any(field.name == "budget" for field in self.parameters()):
            return dataclasses.replace(self, budget=fraction)  # type: ignore[call-arg]
        return None

    @property
    def moments(self) -> frozenset[Moment]:
        """When it cuts, as its limits say."""
        limits = self.limits(1024)
        found = {Moment.AFTER_CHUNK} if self.streams else set()
        found |= {Moment.AFTER_PREFILL} if limits.after_prompt is not None else set()
        return frozenset(found | ({Moment.AFTER_STEP} if limits.high is not None else set()))

    def limits(self, prompt_tokens: int) -> Limits:
        """Return how many tokens a lane holds under a uniform budget, for a prompt of so many."""
        return Limits()

    @property
    def received(self) -> Received | None:
        """The attention that it scores by; None: none, which spares its computation."""
        return next((need for need in self.needs if isinstance(need, Received)), None)

    def recent_tokens(self, prompt_tokens: int) -> int:
        """Return how many of the newest tokens may not be evicted."""
        return 0

    def reach(self, prompt_tokens: int) -> Reach | None:
        """Return what a prompt query may see, where the strategy limits that; None: everything before it."""
        return None

    def scores(self, view: LaneView) -> Tensor:
        """Return float32 scores [B, H, S]: where slots are short, the lowest goes first and infinity never goes."""
        raise AssertionError(f"{self.name} never evicts and is not asked")


@dataclass(frozen=True, kw_only=True)
class Budget(Stage):
    """Axis *budget*: how what a *keep* stage may hold is divided among layers and heads; without one, evenly.

    Attributes:
        ragged: heads of a layer may hold different numbers of tokens, as `counts` says.
    """

    axis: ClassVar[Axis] = Axis.BUDGET
    ragged: ClassVar[bool] = False

    def lacks(self, others: Collection[Stage]) -> str | None:
        """Ask for something to divide."""
        if any(isinstance(other, Keep) and not other.info.traits.keeps_all for other in others):
            return None
        return "it divides what a stage keeps; add one that drops tokens, such as 'snapkv(budget=0.25)'"

    def of_layer(self, kept: int, recent: int, prompt_tokens: int, layer: int, num_layers: int) -> int:
        """Return how many tokens a lane of a layer keeps of a prompt, on average over its lanes.

        Args:
            kept: tokens, evenly divided.
            recent: of these, the newest, which always stay.
            prompt_tokens: length of the prompt.
            layer: place of the layer among those that the budget is divided among, from 0.
            num_layers: how many these are.
        """
        return kept

    def most_of_lane(self, kept: int, lanes: int) -> int:
        """Return the most tokens that one of a layer's lanes keeps, where they keep ``kept`` on average."""
        return kept

    def counts(self, scores_BLHS: Tensor, kept_BL: Tensor) -> Tensor:
        """Return how many tokens each lane keeps, int64 [B, L, H].

        Args:
            scores_BLHS: of the slots of H lanes of L layers; negative infinity where there is no token.
            kept_BL: int64, tokens per lane, on average over a layer's lanes.
        """
        raise AssertionError(f"{self.name} divides evenly among heads and is not asked")


@dataclass(frozen=True, kw_only=True)
class Encode(Stage):
    """Axis *encode*: in what format keys and values are stored."""

    axis: ClassVar[Axis] = Axis.ENCODE

    @property
    def format(self) -> Format:
        """Format of keys and values; where it is packed, of all but the newest."""
        raise NotImplementedError

    @property
    def residual(self) -> int:
        """Newest tokens that stay in floating point, because a packed block is written whole."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Place(Stage):
    """Axis *place*: on which tier keys and values live between the steps that read them."""

    axis: ClassVar[Axis] = Axis.PLACE
    tier: ClassVar[Tier]

    @property
    def moments(self) -> frozenset[Moment]:
        """When it acts."""
        return frozenset({Moment.BEFORE_LAYER})

    @property
    def fetches_ahead(self) -> bool:
        """Whether a layer is fetched while the one before it computes."""
        return True

    @property
    def resident_tokens(self) -> int:
        """Tokens of each lane that stay on the device between steps, where what is read is chosen; 0: none do."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Attend(Stage):
    """Axis *attend*: which of the cached tokens a decode step reads.

    Attributes:
        ahead: asked while the layer before runs, with the queries that its input foretells, so that what is chosen can
            come from another tier meanwhile; the new token, which has no key yet, is read beside what is chosen.
        per: whether slots or blocks are chosen.
    """

    axis: ClassVar[Axis] = Axis.ATTEND
    ahead: ClassVar[bool] = False
    per: ClassVar[Per] = Per.SLOT

    @property
    def moments(self) -> frozenset[Moment]:
        """When it acts."""
        return frozenset({Moment.SELECT})

    def conflict(self, other: Stage) -> str | None:
        """Refuse what needs every score, and what single tokens cannot be chosen of."""
        if isinstance(other, Keep) and other.received is not None and other.received.in_decode:
            return "it counts the attention that every token gets, and tokens that are not read get none; leave one out"
        if self.ahead and isinstance(other, Keep) and other.limits(1024).high is not None:
            return "it drops tokens at every step, while those to read are chosen a layer ahead; leave one out"
        if self.per is Per.SLOT and isinstance(other, Encode) and other.format.is_packed:
            return "packed blocks are read whole, and single tokens are chosen; use 'int8' or leave one out"
        return None

    @property
    def dense_layers(self) -> int:
        """Number of first layers that read everything, and stay on the device."""
        return 0

    def most_read(self, cached_tokens: int, group: int, block_size: int) -> int:
        """Return the most cached tokens of a lane that a step reads; beside the new one, if it is asked ahead.

        Args:
            cached_tokens: tokens that the lane holds.
            group: query heads that read it.
            block_size: slots of a block.
        """
        return cached_tokens

    def select(self, view: QueryView) -> Selection | None:
        """Return what to read, in each lane at most what `most_read` says; None: everything.

        The newest token's slot, or block, must be named, unless the stage is asked ahead.
        """
        return None


def tokens_of(share: int | float, prompt_tokens: int) -> int:
    """Return ``share`` in tokens: itself, or its fraction of the prompt, rounded, at least one."""
    return share if isinstance(share, int) else max(1, round(share * prompt_tokens))


def check_share(stage: str, name: str, value: int | float) -> None:
    """Raise ConfigError unless ``value`` is a number of tokens of at least 1 or a fraction in (0, 1]."""
    if not value > 0 or (isinstance(value, float) and value > 1):
        raise ConfigError(
            f"{stage}: {name}={value} is out of range; write a fraction of the prompt in (0, 1], such as 0.1, "
            "or a whole number of tokens of at least 1"
        )


_LAYERS = re.compile(r"(\d{1,9})(-(\d{0,9}))?", re.ASCII)


def _span(stage: str, layers: str | int | None) -> tuple[int, float]:
    """Return the first and the last layer of ``"0-1"``, ``"2-"``, ``5`` or None (all)."""
    if layers is None:
        return 0, float("inf")
    match = _LAYERS.fullmatch(str(layers))
    first = int(match[1]) if match else 0
    last = float("inf") if match and match[2] == "-" else int(match[3]) if match and match[3] else first
    if match is None or last < first:
        raise ConfigError(f"{stage}: layers={layers} is not understood; write 0-1, 2- or 5, counted from 0")
    return first, last


@cache
def _hints(kind: type[Stage]) -> dict[str, Any]:
    """Return the types of a stage's parameters, evaluated once: every request may bring a sentence of its own."""
    return get_type_hints(kind)


def _coerce(stage: str, key: str, value: Value, hint: Any) -> Value:
    """Return ``value`` as one of the types that a field allows; an int may stand for a float."""
    allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(value) is int and abs(value) > _MOST:
        raise ConfigError(f"{stage}: {key}={value} is out of range; no cache has more than {_MOST:,} tokens")
    if type(value) in allowed:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        return float(value)
    wanted = " or ".join(kind.__name__ for kind in allowed if kind is not types.NoneType)
    shown = format_value(value) if isinstance(value, Value) else value
    raise ConfigError(f"{stage}: {key} wants {wanted}, got {shown!r}")
