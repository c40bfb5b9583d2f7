"""A strategy: stages over five axes, checked when composed, printed and parsed by one grammar."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from typing import TYPE_CHECKING

from kvatlas.core.errors import CompositionError, ConfigError
from kvatlas.core.grammar import parse_sentence
from kvatlas.core.layout import DEFAULT_BLOCK_SIZE
from kvatlas.core.needs import Need
from kvatlas.core.plan import NEUTRAL, Traits
from kvatlas.core.shapes import ModelShape
from kvatlas.core.vocabulary import Axis, Format
from kvatlas.strategies.keep.full import Full
from kvatlas.strategies.recipes import RECIPES
from kvatlas.strategies.registry import stage_class
from kvatlas.strategies.stage import Stage

if TYPE_CHECKING:
    from kvatlas.strategies.plan import Plan


@dataclass(frozen=True)
class Strategy:
    """A composition of stages: for each layer at most one per axis.

    Args:
        stages: in any order; where no stage on the *keep* axis is named, every token is kept.

    Raises:
        CompositionError: two stages answer the same question for a layer, or a stage refuses another.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        order = list(Axis)
        ordered = sorted(self.stages, key=lambda stage: (order.index(stage.axis), stage.first_layer))
        for left, right in combinations(ordered, 2):
            if left.axis == right.axis and left.overlaps(right):
                raise CompositionError(
                    f"{left.name!r} and {right.name!r} cannot be composed: both answer the axis {left.axis.value!r}; "
                    "leave one out, or give them different layers, such as layers=0-1 and layers=2-"
                )
        for stage in ordered:
            for other in ordered:
                if stage is not other and stage.overlaps(other) and (reason := stage.conflict(other)):
                    raise CompositionError(f"{stage.name!r} and {other.name!r} cannot be composed: {reason}")
        if not any(stage.axis is Axis.KEEP for stage in ordered):
            ordered.insert(0, Full())
        for stage in ordered:
            if missing := stage.lacks([other for other in ordered if other is not stage and other.overlaps(stage)]):
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

    def on(self, axis: Axis) -> list[Stage]:
        """Return the stages that answer one question, in order of their layers."""
        return [stage for stage in self.stages if stage.axis == axis]

    @cached_property
    def traits(self) -> Traits:
        """What holds of all stages."""
        found = NEUTRAL
        for stage in self.stages:
            found &= stage.info.traits
        return found

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """Everything that must be computed or kept for the stages."""
        return tuple(dict.fromkeys(need for stage in self.stages for need in stage.needs))

    def plan(self, shape: ModelShape, own: Format, block_size: int = DEFAULT_BLOCK_SIZE) -> Plan:
        """Return what the strategy means for a model; worked out once.

        Args:
            shape: the model.
            own: its own element format.
            block_size: slots per block.

        Raises:
            CompositionError: stages do not fit together on some layer of this model.
            ConfigError: blocks of this size cannot be packed.
            UnsupportedError: the model has no layer that a stage could work on.
        """
        return _plan(self, shape, own, block_size)

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


@lru_cache(maxsize=1024)
def _plan(strategy: Strategy, shape: ModelShape, own: Format, block_size: int) -> Plan:
    from kvatlas.strategies.plan import Plan  # which is made of strategies

    return Plan(strategy, shape, own, block_size)
