"""What a strategy means for a model, worked out once: per layer its stages and its storage. No torch.

Storage, scheduler, admission and footprints take the plan and ask no stage by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from kvatlas.core.errors import CompositionError, ConfigError, UnsupportedError
from kvatlas.core.footprint import Footprint
from kvatlas.core.layout import BlockLayout, layout_of
from kvatlas.core.needs import Derived, Logprobs, Need, QueryMoments, Received, RecentQueries, Record
from kvatlas.core.plan import CachePlan, LayerCache, Traits
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.streams import SideLayout, Stream
from kvatlas.core.vocabulary import Axis, Format, Per, Tier
from kvatlas.strategies.footprint import footprint
from kvatlas.strategies.keep.full import Full
from kvatlas.strategies.recorders import recorder_of
from kvatlas.strategies.stage import Attend, Budget, Encode, Keep, Limits, Place, Stage
from kvatlas.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer of a model under a strategy; a layer that reads another's lanes is planned as that one.

    Args:
        index: of the layer, in order of execution.
        shape: its shape.
        keep: which tokens stay.
        budget: how the kept ones are divided; None: evenly.
        attend: what a decode step reads; None: everything.
        place: where keys and values live; None: on the device.
        store: what is stored.
        turn: place of the layer among those that the budget is divided among, and how many these are.
    """

    index: int
    shape: LayerShape
    keep: Keep
    budget: Budget | None
    attend: Attend | None
    place: Place | None
    store: LayerCache
    turn: tuple[int, int] = (0, 1)

    @cached_property
    def stages(self) -> list[Stage]:
        """All that act on it, but for what only encodes."""
        return [stage for stage in (self.keep, self.budget, self.attend, self.place) if stage is not None]

    @cached_property
    def received(self) -> Received | None:
        """The attention that must be counted; None: none."""
        return self.keep.received

    @property
    def evicts(self) -> bool:
        """Whether tokens are ever dropped, passed windows left out."""
        return not self.keep.info.traits.keeps_all

    @property
    def ragged(self) -> bool:
        """Whether heads may hold different numbers of tokens."""
        return self.budget is not None and self.budget.ragged

    def limits(self, prompt_tokens: int) -> Limits:
        """Return how many tokens a lane holds, on average over the layer's lanes."""
        limits = self.keep.limits(prompt_tokens)
        if self.budget is None or limits.after_prompt is None:
            return limits
        recent = self.keep.recent_tokens(prompt_tokens)
        return limits.resized(self.budget.of_layer(limits.after_prompt, recent, prompt_tokens, *self.turn))


class Plan:
    """A strategy resolved for a model.

    Args:
        strategy: what is resolved.
        shape: the model.
        own: the model's own element format, used where the strategy names none.
        block_size: slots per block.

    Attributes:
        layers: one entry per layer of the model.
        cache: what is stored of a sequence.
        traits: what holds of the strategy.
        kind: requests whose plans are of one kind run in one call, whatever their budgets.
    """

    def __init__(self, strategy: Strategy, shape: ModelShape, own: Format, block_size: int) -> None:
        self.strategy = strategy
        self.shape = shape
        self.block_size = block_size
        self.traits: Traits = strategy.traits
        _check_layers(strategy, shape)
        _check_sharing(strategy)
        owned = {index: self._layer(index, own) for index in shape.owners}
        _check_packing(strategy, shape, owned)
        _check_places(owned)
        owned = _with_turns(owned)
        self.layers = [owned[_owner(shape, index)] for index in range(len(shape.layers))]
        self.owned = list(owned.values())
        self.cache = CachePlan(shape, tuple((index, layer.store) for index, layer in owned.items()))
        stages = tuple(tuple(stage.kind for stage in strategy.stages if stage.covers(i)) for i in shape.owners)
        self.kind = _KINDS.setdefault((stages, self.cache), len(_KINDS))

    def _layer(self, index: int, own: Format) -> LayerPlan:
        shape = self.shape.layers[index]
        keep, budget, encode, attend, place = (self._stage(axis, index) for axis in _ORDER)
        keep = keep or Full()
        assert isinstance(keep, Keep) and isinstance(encode, Encode | None) and isinstance(attend, Attend | None)
        assert isinstance(budget, Budget | None) and isinstance(place, Place | None)
        dense = 0 if attend is None else attend.dense_layers
        single = attend is not None and attend.per is Per.SLOT  # of these, what a window has passed would be read
        if attend is not None and (index < dense or (shape.window is not None and (place is None or single))):
            attend = None
        if place is not None and (index < dense or (shape.window is not None and single)):
            place = None
        budget = None if keep.info.traits.keeps_all else budget
        acting: list[Stage] = [stage for stage in (keep, budget, encode, attend, place) if stage is not None]
        return LayerPlan(
            index=index,
            shape=shape,
            keep=keep,
            budget=budget,
            attend=attend,
            place=place,
            store=self._stored(shape, own, encode, attend, place, acting),
        )

    def _stage(self, axis: Axis, index: int) -> object | None:
        return next((stage for stage in self.strategy.on(axis) if stage.covers(index)), None)

    def _stored(
        self,
        shape: LayerShape,
        own: Format,
        encode: Encode | None,
        attend: Attend | None,
        place: Place | None,
        acting: list[Stage],
    ) -> LayerCache:
        size = self.block_size
        packed = encode.format if encode is not None and encode.format.is_packed and shape.window is None else None
        format = own if encode is None else _beside_packed(own) if encode.format.is_packed else encode.format
        old: BlockLayout | None = None if packed is None else layout_of(shape, packed, size)
        side, derived, later = _streams(shape, format, size, acting)
        if later and (packed is not None or any(stream.every != 1 for stream, _ in later)):
            raise CompositionError(
                f"{later[0][1].name} makes {later[0][0].name!r} once a prompt is over: slot by slot, and of blocks "
                "that are not packed; leave 'kivi' or 'every' out"
            )
        recorded = tuple(
            (need.stream(shape), stage) for stage in acting for need in stage.needs if isinstance(need, Record)
        )
        seen = dict.fromkeys(n for stage in acting for n in stage.needs if isinstance(n, RecentQueries | QueryMoments))
        watched = tuple((need.stream(shape), recorder_of(need)) for need in seen)
        lasting = tuple(stream for stream, _ in (*recorded, *watched))
        return LayerCache(
            own=layout_of(shape, format, size),
            tier=Tier.DEVICE if place is None else place.tier,
            old=old,
            residual=0 if old is None or encode is None else encode.residual,
            resident=0 if place is None or attend is None else place.resident_tokens,
            side=side,
            derived=derived,
            later=later,
            records=SideLayout(lasting, block_size=1) if lasting else None,
            recorded=recorded,
            watched=watched,
            makers=tuple(dict.fromkeys(by.kind for _, by in (*derived, *later, *recorded, *watched))),
        )

    @cached_property
    def evicts(self) -> bool:
        """Whether tokens are ever dropped, passed windows left out."""
        return any(layer.evicts for layer in self.owned)

    @cached_property
    def packs(self) -> bool:
        """Whether old blocks of some layer are packed."""
        return any(layer.store.old is not None for layer in self.owned)

    def encodes(self, *, in_prompt: bool) -> bool:
        """Whether old blocks are packed now.

        Packed blocks cannot be cut well, so what will be cut at the end of a prompt is packed after it.
        """
        return self.packs and not (in_prompt and self.evicts)

    @cached_property
    def chooses(self) -> bool:
        """Whether what a decode step reads of the host is chosen."""
        return any(layer.place is not None and layer.attend is not None for layer in self.owned)

    @cached_property
    def chooses_late(self) -> bool:
        """Whether it is chosen when its layer runs, not before."""
        return any(
            layer.place is not None and layer.attend is not None and not layer.attend.ahead for layer in self.owned
        )

    @cached_property
    def fetches_ahead(self) -> bool:
        """Whether a layer is fetched from the host while the one before it computes."""
        return all(layer.place.fetches_ahead for layer in self.owned if layer.place is not None)

    def most_fetched(self, cached_tokens: int) -> int:
        """Return the most tokens of a lane on the host that a decode step reads beside the new one."""
        asked = [layer.attend for layer in self.owned if layer.place is not None and layer.attend is not None]
        return max(
            (attend.most_read(cached_tokens, self.shape.largest_group, self.block_size) for attend in asked),
            default=cached_tokens,
        )

    @cached_property
    def resident_tokens(self) -> int:
        """The most tokens of a lane on the host that the device mirrors between steps; 0: none."""
        return max(layer.store.resident for layer in self.owned)

    def visiting(self, cached_tokens: int, count: int = 1) -> int:
        """Return the slots that a decode step has on the device for a lane on the host, ``count`` new ones among them.

        What is mirrored is never less than a step reads, nor more than there is.
        """
        most = self.most_fetched(cached_tokens) + count
        return max(most, min(self.resident_tokens, cached_tokens + count))

    @cached_property
    def _needs(self) -> tuple[Need, ...]:
        """What the stages need where they act."""
        return tuple(dict.fromkeys(need for layer in self.owned for stage in layer.stages for need in stage.needs))

    @cached_property
    def logprobs(self) -> bool:
        """Whether the log-probability of each token is kept."""
        return any(isinstance(need, Logprobs) for need in self._needs)

    @cached_property
    def forkable(self) -> bool:
        """Whether a copy of a cache goes on as the original would: nothing depends on who made which block."""
        lasting = any(
            isinstance(need, Received | Record | RecentQueries | QueryMoments | Logprobs) for need in self._needs
        )
        return self.traits.keeps_all and not self.packs and not lasting

    def unshared_tokens(self) -> int:
        """Return how many of a prompt's last tokens are computed even if all are known: the last, or observed ones."""
        queries = [need.queries for need in self._needs if isinstance(need, Received)]
        queries += [need.number for need in self._needs if isinstance(need, RecentQueries)]
        return max([1, *(count for count in queries if count is not None)])

    def footprint(self, prompt_tokens: int, output_tokens: int, chunk_tokens: int) -> Footprint:
        """Return the bounds of one request on each tier.

        Args:
            prompt_tokens: tokens of the prompt.
            output_tokens: most tokens that may be generated.
            chunk_tokens: most prompt tokens that one step processes.
        """
        return footprint(self, prompt_tokens, output_tokens, chunk_tokens)


_KINDS: dict[object, int] = {}
_TORCH_NAMES = {Format.FP32: "float32", Format.BF16: "bfloat16", Format.FP16: "float16"}
_ORDER = (Axis.KEEP, Axis.BUDGET, Axis.ENCODE, Axis.ATTEND, Axis.PLACE)


def _owner(shape: ModelShape, index: int) -> int:
    shared = shape.layers[index].shares_kv_with
    return index if shared is None else shared


def _beside_packed(own: Format) -> Format:
    """Return the format of new tokens beside a packed one: two bytes an element are precise enough there."""
    return Format.FP16 if own is Format.FP32 else own


_Made = tuple[tuple[Stream, Stage], ...]


def _streams(
    shape: LayerShape, format: Format, block_size: int, acting: list[Stage]
) -> tuple[SideLayout | None, _Made, _Made]:
    """Return what lies beside a layer's keys and values, what of it its stages make at once, and what later."""
    found: dict[str, tuple[Stream, Stage, Need]] = {}
    for stage in acting:
        for need in stage.needs:
            if isinstance(need, Received | Derived | Logprobs):
                stream = need.stream(shape, _TORCH_NAMES.get(format, "float16"))
                if stream.name in found and not isinstance(need, Logprobs):
                    raise CompositionError(
                        f"{found[stream.name][1].name} and {stage.name} both keep {stream.name!r}; rename one's"
                    )
                found[stream.name] = stream, stage, need
    made = [(stream, stage, need.later) for stream, stage, need in found.values() if isinstance(need, Derived)]
    side = SideLayout(tuple(stream for stream, _, _ in found.values()), block_size) if found else None
    at_once = tuple((stream, stage) for stream, stage, later in made if not later)
    return side, at_once, tuple((stream, stage) for stream, stage, later in made if later)


def _with_turns(owned: dict[int, LayerPlan]) -> dict[int, LayerPlan]:
    """Tell each layer its place among those whose budget one stage divides; a window is a limit of its own."""
    members: dict[Budget, list[int]] = {}
    for index, layer in owned.items():
        if layer.budget is not None and layer.shape.window is None:
            members.setdefault(layer.budget, []).append(index)
    turns = {index: (turn, len(found)) for found in members.values() for turn, index in enumerate(found)}
    return {
        index: replace(layer, turn=turns[index]) if index in turns else replace(layer, budget=None)
        for index, layer in owned.items()
    }


def _check_layers(strategy: Strategy, shape: ModelShape) -> None:
    for stage in strategy.stages:
        if not any(stage.covers(index) for index in shape.owners):
            raise UnsupportedError(
                f"{stage} is for no layer of {shape.name} that keeps keys and values; it has {len(shape.layers)} "
                "layers, counted from 0"
            )


def _check_sharing(strategy: Strategy) -> None:
    """Refuse a trait that cannot be: what an entry of the prefix cache does not hold would be missing in silence."""
    for stage in strategy.stages:
        if not stage.info.traits.prompt_shareable:
            continue
        if any(isinstance(need, Record | QueryMoments | Logprobs) for need in stage.needs):
            raise ConfigError(
                f"{stage.name} says that prompts are shareable, but it observes all of a prompt; "
                "take prompt_shareable out of its traits"
            )
        if not isinstance(stage, Keep):
            continue
        counts_all = stage.received is not None and stage.received.queries is None
        if counts_all or stage.streams or stage.reach(1024) is not None:
            raise ConfigError(
                f"{stage.name} says that prompts are shareable, but it "
                f"{'counts the attention of all queries' if counts_all else 'limits what a prompt sees'}; "
                "take prompt_shareable out of its traits"
            )


def _check_packing(strategy: Strategy, shape: ModelShape, owned: dict[int, LayerPlan]) -> None:
    packs = any(isinstance(stage, Encode) and stage.format.is_packed for stage in strategy.stages)
    if packs and all(layer.store.old is None for layer in owned.values()):
        raise UnsupportedError(
            f"every layer of {shape.name} has a sliding window, which drops tokens before they are old; use 'int8'"
        )


def _check_places(owned: dict[int, LayerPlan]) -> None:
    hosted = [layer for layer in owned.values() if layer.place is not None]
    if len({None if layer.attend is None else layer.attend.ahead for layer in hosted}) > 1:
        raise CompositionError(
            "what is offloaded is chosen in all its layers or in none; give both stages one 'layers'"
        )
    if len({bool(layer.store.resident) for layer in hosted}) > 1:
        raise CompositionError("of what is offloaded, some stays in all layers or in none; give one 'resident' to all")
