"""What a strategy means for a model, as far as storage must know: values without torch.

Everything here is per layer, since a stage may be given to some layers only.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from kvatlas.core.layout import DEFAULT_BLOCK_SIZE, BlockLayout, layout_of, staging_buffers
from kvatlas.core.shapes import ModelShape
from kvatlas.core.streams import SideLayout, Stream
from kvatlas.core.vocabulary import Format, Tier

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import ChunkView, TokenView


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What holds of a stage; of a strategy holds what holds of all its stages.

    Args:
        exact: outputs equal those of the full cache.
        keeps_all: nothing is ever dropped.
        prompt_shareable: until a prompt's end, its keys and values depend on its tokens alone.
        recomputable: all tokens so far, processed as one prompt, give the cache that prompts and steps gave.
        query_agnostic: what was kept was not chosen by the questions asked so far.
    """

    exact: bool = False
    keeps_all: bool = False
    prompt_shareable: bool = False
    recomputable: bool = False
    query_agnostic: bool = False

    def __and__(self, other: Traits) -> Traits:
        """Return what holds of both."""
        return Traits(**{each.name: getattr(self, each.name) and getattr(other, each.name) for each in fields(self)})


NOTHING = Traits()
"""Nothing holds for certain."""
NEUTRAL = Traits(exact=True, keeps_all=True, prompt_shareable=True, recomputable=True, query_agnostic=True)
"""Of a stage that changes no number: what holds of the others holds."""
INEXACT = Traits(keeps_all=True, prompt_shareable=True, recomputable=True, query_agnostic=True)
"""Of a stage that rounds each token by itself when it is written, or only divides what another keeps."""


class Deriver(Protocol):
    """Who makes the entries of a stream from keys and values; stages are."""

    def derive(self, name: str, tokens: TokenView) -> Tensor:
        """Return the entry [.., width] of each token [..]."""

    def merge(self, name: str, one: Tensor, other: Tensor) -> Tensor:
        """Return the entry [.., width] of the tokens of two entries together."""


class Recorder(Protocol):
    """Who keeps records of a lane; stages are."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What two of them must have in common to keep the same."""

    def observe(self, name: str, chunk: ChunkView) -> Tensor:
        """Return what a record [.., width] is after a further chunk, or step."""

    def begin(self, prompt: TokenView) -> Mapping[str, Tensor]:
        """Return records [H, width] to set at the end of the first prompt."""


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """What is stored of a layer that owns lanes; equal where the same streams are made by stages of one kind.

    Args:
        own: blocks of new tokens.
        tier: where those blocks live that are there to stay: encoded ones, where there are such, else all.
        old: blocks that full blocks are encoded to once they are old; None: they stay as they are.
        residual: newest tokens of a lane that are not encoded, at least.
        resident: slots of a lane on the host that the device mirrors between steps, at least; 0: none stay.
        side: device blocks of streams beside all those blocks; None: there are none.
        derived: streams made from keys and values, each with who makes them.
        later: likewise, but not before the first prompt is over.
        records: a device block of what each lane has one of; None: there is none.
        recorded: what `records` holds, each with who observes it.
        watched: likewise of what is observed with every chunk and step.
        makers: who makes and observes all these, by their kinds.
    """

    own: BlockLayout
    tier: Tier = Tier.DEVICE
    old: BlockLayout | None = None
    residual: int = 0
    resident: int = 0
    side: SideLayout | None = None
    derived: tuple[tuple[Stream, Deriver], ...] = field(default=(), compare=False)
    later: tuple[tuple[Stream, Deriver], ...] = field(default=(), compare=False)
    records: SideLayout | None = None
    recorded: tuple[tuple[Stream, Recorder], ...] = field(default=(), compare=False)
    watched: tuple[tuple[Stream, Recorder], ...] = field(default=(), compare=False)
    makers: tuple[Hashable, ...] = ()

    @property
    def own_tier(self) -> Tier:
        """Where blocks of new tokens live: on the device as long as they wait to be encoded."""
        return self.tier if self.old is None else Tier.DEVICE

    @property
    def lasting(self) -> BlockLayout:
        """Blocks that are there to stay, on `tier`."""
        return self.own if self.old is None else self.old


@dataclass(frozen=True)
class CachePlan:
    """What is stored of a sequence.

    Args:
        shape: the model.
        layers: (index, what is stored) of each layer that owns lanes, in order of execution.
    """

    shape: ModelShape
    layers: tuple[tuple[int, LayerCache], ...]

    @cached_property
    def host_layers(self) -> tuple[int, ...]:
        """Layers that own lanes on the host."""
        return tuple(index for index, layer in self.layers if layer.tier is Tier.HOST)

    @cached_property
    def buffers(self) -> dict[int, int]:
        """Layer that reads lanes on the host -> layer whose lanes name its staging buffer on the device."""
        return staging_buffers(self.shape, {i: layer.lasting for i, layer in self.layers if layer.tier is Tier.HOST})

    @cached_property
    def contents(self) -> str:
        """What must be equal, tokens apart, for keys and values of a prompt to be the very same bytes."""
        return ",".join(f"{layer.own.format.value}@{layer.own_tier.value}" for _, layer in self.layers)

    @cached_property
    def _hash(self) -> int:
        return hash(self.layers)

    def __hash__(self) -> int:
        return self._hash


def uniform_cache(
    shape: ModelShape,
    format: Format,
    block_size: int = DEFAULT_BLOCK_SIZE,
    streams: tuple[Stream, ...] = (),
    *,
    derived: tuple[tuple[Stream, Deriver], ...] = (),
    host_layers: Collection[int] = (),
    packed: Format | None = None,
    residual: int = 0,
) -> CachePlan:
    """Return the plan in which all layers are alike, but for where they live; windowed layers are never packed."""
    beside = streams + tuple(stream for stream, _ in derived)

    def cache(index: int) -> LayerCache:
        layer, on_host = shape.layers[index], index in host_layers
        old = packed if layer.window is None else None
        return LayerCache(
            own=layout_of(layer, format, block_size),
            tier=Tier.HOST if on_host else Tier.DEVICE,
            old=None if old is None else layout_of(layer, old, block_size),
            residual=0 if old is None else residual,
            side=SideLayout(beside, block_size) if beside else None,
            derived=derived,
            makers=derived,
        )

    return CachePlan(shape, tuple((index, cache(index)) for index in shape.owners))
