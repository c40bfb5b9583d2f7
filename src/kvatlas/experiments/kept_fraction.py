"""Compare strategies at equal kept fractions: what each keeps of the prompt, or reads of the cache per step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvatlas.core.errors import ConfigError
from kvatlas.core.vocabulary import Axis
from kvatlas.strategies.attend.speculate import Speculate
from kvatlas.strategies.keep.h2o import H2O
from kvatlas.strategies.keep.snapkv import SnapKV
from kvatlas.strategies.keep.streaming_llm import StreamingLLM
from kvatlas.strategies.stage import Stage
from kvatlas.strategies.strategy import Strategy

_WINDOW = 16


def at_budget(strategy: Strategy, budget: float) -> Strategy:
    """Return the strategy with a kept fraction: what it keeps of the prompt, or reads of it per step, is ``budget``.

    H2O splits it evenly between heavy hitters and recent tokens. Speculation takes it as its cap, with an alpha so
    large that the cap decides: else it would read less than its budget.

    Raises:
        ConfigError: a stage takes no such share.
    """
    return Strategy(tuple(_stage_at(stage, budget) for stage in strategy.stages))


def has_budget(strategy: Strategy) -> bool:
    """Return whether a kept fraction means anything to a strategy: it drops tokens or leaves some unread."""
    return strategy.keep.name != "full" or any(isinstance(stage, Speculate) for stage in strategy.stages)


def compared(sentences: Sequence[str], budgets: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield (strategy, kept fraction): those without a fraction once, at 1; the others at each, largest first.

    Of lossless strategies only the first is asked: their answers are equal. Strategies that differ by their fraction
    alone are one.
    """
    parsed = [Strategy.parse(sentence) for sentence in sentences]
    lossless = [strategy for strategy in parsed if strategy.lossless][:1]
    for strategy in dict.fromkeys(one for one in parsed if not has_budget(one)):
        if not strategy.lossless or strategy in lossless:
            yield str(strategy), 1.0
    for budget in sorted(budgets, reverse=True):
        for strategy in dict.fromkeys(at_budget(one, budget) for one in parsed if has_budget(one)):
            yield str(strategy), budget


def _stage_at(stage: Stage, budget: float) -> Stage:
    half = round(budget / 2, 6)
    if isinstance(stage, H2O):
        return replace(stage, heavy=half, recent=half)
    if isinstance(stage, SnapKV):
        return replace(stage, budget=budget, window=_WINDOW)
    if isinstance(stage, StreamingLLM):
        return replace(stage, sinks=4, recent=budget)
    if isinstance(stage, Speculate):
        return replace(stage, alpha=math.inf, cap=budget)
    if stage.axis == Axis.KEEP and stage.name != "full":
        raise ConfigError(f"the kept fraction of {stage.name!r} cannot be set; leave this strategy out here")
    return stage
