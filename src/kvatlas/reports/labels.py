"""Names on axes and in tables: of a strategy's series, of a condition, of the params that stay the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvatlas.core.units import format_bytes
from kvatlas.records.schema import Params

BASELINE = "full"
BUDGET = "budget"

_ARGUMENTS = re.compile(r"\([^()]*\)")
_PARAM_NAMES = {"kv_memory_bytes": "KV memory", "slo": "SLO", "num_keys": "keys"}


@dataclass(frozen=True, kw_only=True)
class SeriesKey:
    """What makes samples one series.

    Args:
        name: the whole sentence; without its numbers where a budget stands in for them.
        budget: kept fraction, in (0, 1], or None where the experiment has none.
    """

    name: str
    budget: float | None = None

    @property
    def label(self) -> str:
        """The name, with the budget as a percentage; the full cache has no budget to name."""
        if self.budget is None or self.name == BASELINE:
            return self.name
        return f"{self.name} {format_share(self.budget)}"

    @property
    def order(self) -> tuple[bool, str, float, str]:
        """Sorts the baseline first, then families, then budgets from large to small."""
        return (self.name != BASELINE, family(self.name), -(self.budget or 0.0), self.name)


def family(strategy: str) -> str:
    """Return the stages' names without their numbers: ``h2o(heavy=0.1) | int4(group=64)`` -> ``h2o | int4``."""
    return _ARGUMENTS.sub("", strategy).strip()


def series_keys(settings: Iterable[tuple[str, Params, float]]) -> dict[tuple[str, float | None], SeriesKey]:
    """Return (sentence, budget) -> its series, for settings of (sentence, params, x).

    Under a budget the numbers inside a sentence change with x while the budget is the constant, so they are
    left out; they stay where two sentences of one family share budget and x, which would mix their samples.
    """
    found = [(strategy, budget_of(params), x) for strategy, params, x in settings]
    sentences: dict[tuple[str, float | None, float], set[str]] = defaultdict(set)
    for strategy, budget, x in found:
        sentences[family(strategy), budget, x].add(strategy)
    mixed = {(name, budget) for (name, budget, _), several in sentences.items() if len(several) > 1}
    return {
        (strategy, budget): SeriesKey(name=_name(strategy, budget, mixed), budget=budget)
        for strategy, budget, _ in found
    }


def budget_of(params: Mapping[str, object]) -> float | None:
    """Return the kept fraction that the params name, or None."""
    value = params.get(BUDGET)
    return float(value) if isinstance(value, int | float) else None


def describe(params: Mapping[str, int | float | str]) -> str:
    """Return ``"trace azure_code, requests 200, KV memory 64 MiB"``."""
    return ", ".join(f"{_param_name(name)} {_param_value(name, value)}" for name, value in params.items())


def format_share(share: float) -> str:
    """Return ``"20 %"``, with as many decimals as a small share needs."""
    return f"{share * 100:.3g} %"


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return the names joined by commas, the last ones counted where there are many."""
    found = list(names)
    if len(found) <= most:
        return ", ".join(found)
    return f"{', '.join(found[: most - 1])} and {len(found) - most + 1} more"


def _name(strategy: str, budget: float | None, mixed: set[tuple[str, float | None]]) -> str:
    if budget is None or (family(strategy), budget) in mixed:
        return strategy
    return family(strategy)


def _param_name(name: str) -> str:
    return _PARAM_NAMES.get(name) or name.removesuffix("_bytes").replace("_", " ")


def _param_value(name: str, value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("_bytes"):
        return format_bytes(value)
    return format_share(value) if name == BUDGET else f"{value:,}"
