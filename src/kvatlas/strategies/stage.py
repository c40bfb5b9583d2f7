"""What a stage is: a frozen value that looks and answers. Storage acts.

A stage file holds no device code and no hooks, and mutates nothing. It declares, when composed, at which moments
it acts, what it needs computed for it, and how many slots a lane holds under it.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from kvatlas.core.errors import ConfigError
from kvatlas.core.grammar import StageCall, Value, format_value
from kvatlas.core.names import unknown_name
from kvatlas.core.vocabulary import Axis, Format, Moment, Need, Saves, Tier

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import LayerView


_MOST = 2**31 - 1
"""Positions are 32-bit numbers."""


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """Facts about a stage that tables and checks read.

    Args:
        summary: one line for users.
        paper: where the method comes from.
        saves: what it lowers.
        lossless: whether outputs equal those of the full cache.
        needs: what must be computed for it in the forward.
        moments: when it acts.
    """

    summary: str
    paper: str
    saves: tuple[Saves, ...] = ()
    lossless: bool = False
    needs: frozenset[Need] = frozenset()
    moments: frozenset[Moment] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of all stages; subclasses are frozen dataclasses whose fields are the parameters users write.

    Raises:
        ConfigError: a parameter has the wrong type, or is a whole number that no tensor of tokens could have.
    """

    name: ClassVar[str]
    axis: ClassVar[Axis]
    info: ClassVar[StageInfo]

    def __post_init__(self) -> None:
        """Check types; subclasses that check ranges call this first."""
        kind: Any = type(self)  # mypy takes the hash of a class for that of its values
        hints = _hints(kind)
        for field in dataclasses.fields(self):
            value = _coerce(self.name, field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_call(cls, call: StageCall) -> Stage:
        """Return the stage that a parsed call describes.

        Raises:
            ConfigError: a parameter is unknown, given twice, of the wrong type or out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if len(call.positional) > len(names):
            raise ConfigError(f"{cls.name} takes {len(names)} parameter(s), got {len(call.positional)}: {call}")
        given = dict(zip(names, call.positional, strict=False))
        for key, value in call.named:
            if key not in names:
                raise unknown_name(f"parameter of {cls.name}", key, names)
            if key in given:
                raise ConfigError(f"parameter {key!r} of {cls.name} is given twice: {call}")
            given[key] = value
        return cls(**given)

    def conflict(self, other: Stage) -> str | None:
        """Return why this stage cannot work together with ``other``, or None."""
        return None

    def lacks(self, others: Collection[Stage]) -> str | None:
        """Return what this stage needs beside it and does not find among ``others``, or None."""
        return None

    def __str__(self) -> str:
        pairs = [f"{f.name}={format_value(getattr(self, f.name))}" for f in dataclasses.fields(self)]
        return f"{self.name}({', '.join(pairs)})" if pairs else self.name


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a prompt query may see: the first ``sinks`` tokens and the last ``recent``, itself included."""

    sinks: int
    recent: int


@dataclass(frozen=True, kw_only=True)
class Keep(Stage):
    """Axis *keep*: which tokens stay."""

    axis: ClassVar[Axis] = Axis.KEEP

    def capacity(self, prompt_tokens: int) -> int | None:
        """Return the most slots of a lane that a decode step attends to, the new token included; None: all."""
        return None

    def kept_of_prompt(self, prompt_tokens: int) -> int | None:
        """Return the most tokens of a lane that survive the end of a prompt; None: all.

        One less than the capacity, so that the next token has its place, unless the strategy says otherwise.
        """
        capacity = self.capacity(prompt_tokens)
        return None if capacity is None else capacity - 1

    def observed_queries(self, prompt_tokens: int) -> int | None:
        """Return how many of the last prompt tokens count as queries in the column sums; None: all tokens ever."""
        return None

    def recent_tokens(self, prompt_tokens: int) -> int:
        """Return how many of the newest tokens may not be evicted."""
        return 0

    def reach(self, prompt_tokens: int) -> Reach | None:
        """Return what a prompt query may see, where the strategy limits that; None: everything before it."""
        return None

    def scores(self, view: LayerView) -> Tensor:
        """Return float32 scores [B, H, S]: where slots are short, the lowest goes first and infinity never goes."""
        raise AssertionError(f"{self.name} never evicts and is not asked")


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
    def fetches_ahead(self) -> bool:
        """Whether a layer is fetched while the one before it computes."""
        return True


@dataclass(frozen=True, kw_only=True)
class Attend(Stage):
    """Axis *attend*: which of the cached tokens a decode step reads."""

    axis: ClassVar[Axis] = Axis.ATTEND

    @property
    def dense_layers(self) -> int:
        """Number of first layers that read everything."""
        return 0

    @property
    def sketch_share(self) -> float:
        """Share of each key's columns that stays on the device, to choose by; 0: nothing."""
        return 0.0

    @property
    def margin(self) -> float:
        """How far below a query head's best a token may score and still count, in units of the softmax's argument."""
        return float("inf")

    def most_read(self, cached_tokens: int, group: int) -> int:
        """Return the most cached tokens of a lane that a step reads beside the new one.

        Args:
            cached_tokens: tokens that the lane holds.
            group: query heads that read it.
        """
        return cached_tokens

    def pages(self, block_size: int) -> int | None:
        """Return the most blocks of a lane that a step reads, chosen by the bounds of their keys; None: all."""
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
    wanted = " or ".join(kind.__name__ for kind in allowed)
    shown = format_value(value) if isinstance(value, Value) else value
    raise ConfigError(f"{stage}: {key} wants {wanted}, got {shown!r}")
