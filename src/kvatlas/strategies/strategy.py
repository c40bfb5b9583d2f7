"""A strategy: stages over five axes, checked when composed, printed and parsed by one grammar."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from kvatlas.core.errors import CompositionError, ConfigError
from kvatlas.core.grammar import parse_sentence
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Axis, Format, Moment, Need, Sidecar
from kvatlas.strategies.keep.full import Full
from kvatlas.strategies.recipes import RECIPES
from kvatlas.strategies.registry import stage_class
from kvatlas.strategies.stage import Attend, Encode, Keep, Place, Stage


@dataclass(frozen=True)
class Strategy:
    """A composition of stages, at most one per axis.

    Args:
        stages: in any order; without a stage on the *keep* axis, every token is kept.

    Raises:
        CompositionError: two stages answer the same question, or a stage refuses another.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        order = list(Axis)
        ordered = sorted(self.stages, key=lambda stage: order.index(stage.axis))
        for left, right in pairwise(ordered):
            if left.axis == right.axis:
                raise CompositionError(
                    f"{left.name!r} and {right.name!r} cannot be composed: both answer the axis {left.axis.value!r}; "
                    "leave one out"
                )
        for stage in ordered:
            for other in ordered:
                if stage is not other and (reason := stage.conflict(other)):
                    raise CompositionError(f"{stage.name!r} and {other.name!r} cannot be composed: {reason}")
        if not any(isinstance(stage, Keep) for stage in ordered):
            ordered.insert(0, Full())
        for stage in ordered:
            if missing := stage.lacks([other for other in ordered if other is not stage]):
                raise CompositionError(f"{stage.name!r} cannot stand alone: {missing}")
        object.__setattr__(self, "stages", tuple(ordered))

    @classmethod
    def parse(cls, text: str | Strategy) -> Strategy:
        """Return the strategy that a sentence such as ``"h2o(heavy=0.1, recent=0.1) | fp16"`` describes.

        Raises:
            ConfigError: the sentence cannot be read, or a name or parameter is unknown or out of range.
            CompositionError: the stages cannot work together.
        """
        if isinstance(text, Strategy):
            return text
        if not isinstance(text, str):
            raise ConfigError(f"a strategy is a sentence such as 'h2o | int8', got {type(text).__name__}")
        stages: list[Stage] = []
        for call in parse_sentence(text):
            recipe = RECIPES.get(call.name)
            if recipe is not None and not call.positional and not call.named:
                stages += [stage_class(part.name).from_call(part) for part in parse_sentence(recipe.sentence)]
            elif recipe is not None and "|" in recipe.sentence:
                raise ConfigError(f"{call.name!r} takes no parameters; write its stages: {recipe.sentence!r}")
            else:
                stages.append(stage_class(call.name).from_call(call))
        return cls(tuple(stages))

    @cached_property
    def keep(self) -> Keep:
        """The stage that says which tokens stay."""
        return next(stage for stage in self.stages if isinstance(stage, Keep))

    @cached_property
    def encode(self) -> Encode | None:
        """The stage that says in what format keys and values are stored; None: the model's own."""
        return next((stage for stage in self.stages if isinstance(stage, Encode)), None)

    @cached_property
    def packed(self) -> Format | None:
        """The packed format that full blocks are encoded to once they are old; None: they stay as they are."""
        return self.encode.format if self.encode is not None and self.encode.format.is_packed else None

    def stored(self, own: Format) -> Format:
        """Return the format that new tokens are stored in.

        Beside a packed format two bytes an element are precise enough.

        Args:
            own: the model's own format.
        """
        if self.encode is None:
            return own
        if self.packed is not None:
            return Format.FP16 if own is Format.FP32 else own
        return self.encode.format

    @cached_property
    def evicts(self) -> bool:
        """Whether tokens are ever dropped."""
        return not self.keep.info.lossless

    def packs(self, layer: LayerShape) -> bool:
        """Whether old blocks of a layer are packed; sliding windows drop them before they are old."""
        return self.packed is not None and layer.window is None

    @cached_property
    def place(self) -> Place | None:
        """The stage that says where keys and values live; None: on the device."""
        return next((stage for stage in self.stages if isinstance(stage, Place)), None)

    @cached_property
    def attend(self) -> Attend | None:
        """The stage that says what a decode step reads; None: everything that is kept."""
        return next((stage for stage in self.stages if isinstance(stage, Attend)), None)

    @cached_property
    def sketch_share(self) -> float:
        """Share of the columns of keys on the host that the device keeps as well."""
        return 0.0 if self.attend is None else self.attend.sketch_share

    def host_layers(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the layers of a model whose keys and values live on the host."""
        if self.place is None:
            return ()
        dense = 0 if self.attend is None else self.attend.dense_layers
        return tuple(index for index in shape.owners if index >= dense)

    @cached_property
    def needs(self) -> frozenset[Need]:
        """Everything that must be computed for the stages."""
        return frozenset[Need]().union(*(stage.info.needs for stage in self.stages))

    @cached_property
    def moments(self) -> frozenset[Moment]:
        """All moments at which a stage acts."""
        return frozenset[Moment]().union(*(stage.info.moments for stage in self.stages))

    @cached_property
    def lossless(self) -> bool:
        """Whether every stage keeps outputs equal to those of the full cache."""
        return all(stage.info.lossless for stage in self.stages)

    @cached_property
    def sidecars(self) -> tuple[Sidecar, ...]:
        """What storage carries per slot for this strategy."""
        sums = (Sidecar.COLUMN_SUMS,) if Need.COLUMN_SUMS in self.needs else ()
        bounds = (Sidecar.KEY_BOUNDS,) if Need.KEY_BOUNDS in self.needs else ()
        return (Sidecar.POSITIONS, *sums, *bounds)

    def pages(self, index: int, layer: LayerShape, block_size: int) -> int | None:
        """Return the most blocks of a lane that a decode step reads in a layer; None: all.

        Args:
            index: of the layer, in order of execution.
            layer: its shape.
            block_size: slots per block.
        """
        if self.attend is None or index < self.attend.dense_layers or layer.window is not None:
            return None
        return self.attend.pages(block_size)

    @cached_property
    def _text(self) -> str:
        return " | ".join(str(stage) for stage in self.stages)

    def __str__(self) -> str:
        return self._text

    # As text, because 1 == 1.0 although one token is not the whole prompt.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Strategy) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)
