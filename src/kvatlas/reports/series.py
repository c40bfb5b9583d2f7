"""Rows of records -> studies -> series with an interval at every mark.

A study is what may share one figure: one experiment, on one model, with all params equal that are not swept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvatlas.metrics.memory import throughput_per_gb
from kvatlas.metrics.statistics import Interval, median_interval, paired_difference_interval, wilson_interval
from kvatlas.records.schema import ModelRole, Params, Provenance, Row
from kvatlas.reports.labels import BASELINE, BUDGET, SeriesKey, budget_of, describe, series_keys
from kvatlas.reports.quantities import SHARE, SHARES

SampleId = tuple[int, int]
Samples = Mapping[SampleId, float]
Table = dict[SeriesKey, dict[float, dict[SampleId, float]]]

SWEPT = {"prompt_length": "prompt_tokens", "concurrency": "concurrency", "early_fact": "context_tokens"}
EXPERIMENTS = (*SWEPT, "trace_replay")
AXES = {
    "prompt_tokens": "Prompt length (tokens)",
    "concurrency": "Concurrent requests",
    "context_tokens": "Context length (tokens)",
}

_CONDITIONS = {
    "prompt_tokens": "{:,.10g} tokens",
    "concurrency": "{:,.10g} at once",
    "context_tokens": "{:,.10g} tokens",
}
# Numbers of samples are not settings; a budget tells series apart, not studies.
_NEVER_SPLIT = frozenset({BUDGET, "n"})
_TRUST: tuple[Provenance, ...] = ("measured", "emulated", "estimated")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One setting of a series.

    Args:
        x: the swept value; 0 where nothing is swept.
        interval: of all samples taken there.
        provenance: the weakest among the samples.
    """

    x: float
    interval: Interval
    provenance: Provenance = "measured"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure: a strategy, with its marks from small x to large."""

    key: SeriesKey
    unit: str
    marks: tuple[Mark, ...]

    @property
    def provenances(self) -> set[Provenance]:
        """How the marks came about."""
        return {mark.provenance for mark in self.marks}

    def at(self, x: float) -> Mark | None:
        """Return the mark at x, or None."""
        return next((mark for mark in self.marks if mark.x == x), None)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The samples that may share a figure.

    Args:
        experiment: its name.
        model: the one model of all rows.
        model_role: the one role of all rows; the two roles never share a figure.
        swept: the param on the x axis, or None.
        split: the params that set this study apart from its siblings.
        rows: the samples.
    """

    experiment: str
    model: str
    model_role: ModelRole
    swept: str | None
    split: Params
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        roles = {row.model_role for row in self.rows}
        assert roles == {self.model_role}, f"one study, one model role; {self.experiment} has {sorted(roles)}"
        assert {row.model for row in self.rows} == {self.model}, f"one study, one model; not so in {self.experiment}"

    @property
    def run_ids(self) -> set[str]:
        """The runs that the rows come from."""
        return {row.run_id for row in self.rows}

    @property
    def metrics(self) -> list[str]:
        """Names of the stored metrics, sorted."""
        return sorted({row.metric for row in self.rows})

    @cached_property
    def keys(self) -> dict[tuple[str, float | None], SeriesKey]:
        """(sentence, budget) -> series."""
        return series_keys((row.strategy, row.params, self.x_of(row.params)) for row in self.rows)

    @property
    def constants(self) -> Params:
        """The params that all rows share, sample counts left out."""
        names = [name for name in self.rows[0].params if name not in {self.swept, *_NEVER_SPLIT}]
        values = {name: {row.params.get(name) for row in self.rows} for name in names}
        return {name: self.rows[0].params[name] for name in names if len(values[name]) == 1}

    def x_of(self, params: Params) -> float:
        """Return the swept value of a point; 0 where nothing is swept."""
        value = params[self.swept] if self.swept else 0
        return float(value)

    def condition(self, x: float) -> str:
        """Return x in words, with what sets this study apart."""
        if self.swept is None:
            trace = {name: self.constants[name] for name in ("trace",) if name in self.constants}
            return describe(trace | self.split or self.constants) or "as run"
        words = _CONDITIONS.get(self.swept, f"{self.swept} {{:,.10g}}").format(x)
        return f"{words}, {describe(self.split)}" if self.split else words

    def samples(self, metric: str) -> Table:
        """Return the raw numbers of a metric: series -> x -> (seed, index) -> value."""
        if metric in _DERIVED:
            return _DERIVED[metric](self)
        found = self._stored.get(metric, {})
        return {key: found[key] for key in sorted(found, key=lambda key: key.order)}

    def series(self, metric: str) -> list[Series]:
        """Return a metric's series, the baseline first; empty where nothing was stored."""
        trust, unit = self._provenance(metric), self.unit(metric)
        return [
            Series(
                key=key,
                unit=unit,
                marks=tuple(
                    Mark(x=x, interval=interval_of(metric, cell), provenance=trust.get((key, x), "measured"))
                    for x, cell in sorted(cells.items())
                ),
            )
            for key, cells in self.samples(metric).items()
        ]

    def unit(self, metric: str) -> str:
        """Return the unit a metric was stored in; "share" for what is right or wrong."""
        if metric in SHARES:
            return SHARE
        if metric == "throughput_per_gb":
            return "tokens/s/GB"
        sources = _SOURCES.get(metric, (metric,))
        return next((row.unit for row in self.rows if row.metric in sources), "")

    def paired(self, metric: str, key: SeriesKey, x: float) -> Interval | None:
        """Return the interval of a series minus the baseline, on the prompts both have; None without any."""
        samples = self.samples(metric)
        baseline = next((cells for other, cells in samples.items() if other.name == BASELINE), {})
        return paired_interval(samples.get(key, {}).get(x, {}), baseline.get(x, {}))

    @cached_property
    def _stored(self) -> dict[str, Table]:
        found: dict[str, Table] = {}
        for row in self.rows:
            cells = found.setdefault(row.metric, {}).setdefault(self._key(row), {})
            cells.setdefault(self.x_of(row.params), {})[row.seed, row.index] = row.value
        return found

    def _key(self, row: Row) -> SeriesKey:
        return self.keys[row.strategy, budget_of(row.params)]

    def _provenance(self, metric: str) -> dict[tuple[SeriesKey, float], Provenance]:
        """Return the weakest provenance of each mark's samples, or of those it was computed from."""
        found: dict[tuple[SeriesKey, float], Provenance] = {}
        for row in self.rows:
            if row.metric in _SOURCES.get(metric, (metric,)):
                mark = (self._key(row), self.x_of(row.params))
                found[mark] = max(found.get(mark, "measured"), row.provenance, key=_TRUST.index)
        return found


def interval_of(metric: str, samples: Samples) -> Interval:
    """Return Wilson's interval for what is right or wrong, else the median's."""
    values = list(samples.values())
    if metric in SHARES and set(values) <= {0.0, 1.0}:
        return wilson_interval(round(sum(values)), len(values))
    return median_interval(values)


def paired_interval(a: Samples, b: Samples) -> Interval | None:
    """Return the interval of a - b over the (seed, index) they share, or None."""
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    return paired_difference_interval([a[found] for found in shared], [b[found] for found in shared])


def studies(rows: Iterable[Row]) -> list[Study]:
    """Return the rows as studies, known experiments first, in the order of `EXPERIMENTS`."""
    groups: dict[tuple[str, str, ModelRole], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.experiment, row.model, row.model_role].append(row)
    order = {name: place for place, name in enumerate(EXPERIMENTS)}
    return [
        study
        for group in sorted(groups, key=lambda group: (order.get(group[0], len(order)), group))
        for study in _split(group, groups[group])
    ]


def _split(group: tuple[str, str, ModelRole], rows: Sequence[Row]) -> list[Study]:
    """Split rows by every param that takes two values at one x: those conditions must not be pooled."""
    experiment, model, role = group
    swept = SWEPT.get(experiment)
    if swept and not all(isinstance(row.params.get(swept), int | float) for row in rows):
        swept = None
    at_x: dict[tuple[object, str], set[object]] = defaultdict(set)
    names = list(dict.fromkeys(name for row in rows for name in row.params if name not in {swept, *_NEVER_SPLIT}))
    for row in rows:
        for name in names:
            at_x[row.params.get(swept or ""), name].add(row.params.get(name))
    splitting = [name for name in names if any(len(found) > 1 for (_, other), found in at_x.items() if other == name)]
    parts: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        parts[tuple(row.params.get(name) for name in splitting)].append(row)
    return [
        Study(
            experiment=experiment,
            model=model,
            model_role=role,
            swept=swept,
            split={name: part[0].params[name] for name in splitting if name in part[0].params},
            rows=tuple(part),
        )
        for part in parts.values()
    ]


def _cache_after_prefill(study: Study) -> Table:
    """Return KV bytes plus sidecar bytes, the memory a strategy really needs."""
    sidecars = study.samples("sidecars_after_prefill")
    return _combine(study.samples("kv_after_prefill"), sidecars, lambda kv, beside: kv + beside)


def _throughput_per_gb(study: Study) -> Table:
    """Return tokens per second and GB of live bytes at their peak, sidecars included."""
    return _combine(study.samples("output_throughput"), study.samples("kv_peak"), throughput_per_gb)


def _combine(
    first: Mapping[SeriesKey, Mapping[float, Samples]],
    second: Mapping[SeriesKey, Mapping[float, Samples]],
    function: Callable[[float, float], float],
) -> Table:
    """Combine samples of equal (seed, index); a single number on one side belongs to all of the other."""
    found: Table = {}
    for key, cells in first.items():
        for x, cell in cells.items():
            partner = second.get(key, {}).get(x, {})
            values = {
                sample: function(value, partner[sample] if sample in partner else next(iter(partner.values())))
                for sample, value in cell.items()
                if sample in partner or len(partner) == 1
            }
            if values:
                found.setdefault(key, {})[x] = values
    return found


_DERIVED = {"cache_after_prefill": _cache_after_prefill, "throughput_per_gb": _throughput_per_gb}
_SOURCES = {
    "cache_after_prefill": ("kv_after_prefill", "sidecars_after_prefill"),
    "throughput_per_gb": ("output_throughput", "kv_peak"),
}
