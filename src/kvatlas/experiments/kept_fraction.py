"""Compare strategies at equal kept fractions: what each keeps of the prompt, or reads of the cache per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvatlas.core.errors import ConfigError
from kvatlas.strategies.stage import Stage
from kvatlas.strategies.strategy import Strategy


def at_budget(strategy: Strategy, budget: float) -> Strategy:
    """Return the strategy with a kept fraction: what it keeps of the prompt, or reads of it per step, is ``budget``.

    How a stage divides it is the stage's own answer (`Stage.sized`).

    Raises:
        ConfigError: a stage drops tokens and takes no such share.
    """
    return Strategy(tuple(_stage_at(stage, budget) for stage in strategy.stages))


def has_budget(strategy: Strategy) -> bool:
    """Return whether a kept fraction means anything to a strategy: it drops tokens or leaves some unread."""
    return not strategy.traits.keeps_all or any(stage.sized(0.5) is not None for stage in strategy.stages)


def compared(sentences: Sequence[str], budgets: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield (strategy, kept fraction): those without a fraction once, at 1; the others at each, largest first.

    Of lossless strategies only the first is asked: their answers are equal. Strategies that differ by their fraction
    alone are one.
    """
    parsed = [Strategy.parse(sentence) for sentence in sentences]
    lossless = [strategy for strategy in parsed if strategy.traits.exact][:1]
    for strategy in dict.fromkeys(one for one in parsed if not has_budget(one)):
        if not strategy.traits.exact or strategy in lossless:
            yield str(strategy), 1.0
    for budget in sorted(budgets, reverse=True):
        for strategy in dict.fromkeys(at_budget(one, budget) for one in parsed if has_budget(one)):
            yield str(strategy), budget


def _stage_at(stage: Stage, budget: float) -> Stage:
    sized = stage.sized(budget)
    if sized is None and not stage.info.traits.keeps_all:
        raise ConfigError(f"the kept fraction of {stage.name!r} cannot be set; leave this strategy out here")
    return sized or stage
