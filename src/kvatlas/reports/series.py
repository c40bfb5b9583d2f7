"""Rows of records -> studies -> series with an interval at every mark.

A study is what may share one figure: one experiment, on one model, with all params equal that are not swept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from kvatlas.metrics.statistics import Interval
from kvatlas.records.schema import ACCELERATOR, PROCESSOR, ModelRole, Params, Provenance, Row
from kvatlas.reports.intervals import (
    COUNTED_BY,
    LATENCIES,
    SampleId,
    Samples,
    interval_of,
    interval_over_runs,
    paired_interval,
    pooled,
    split_runs,
)
from kvatlas.reports.known import CONDITIONS
from kvatlas.reports.labels import (
    BASELINE,
    BUDGET,
    LINK,
    NO_LINK,
    SeriesKey,
    budget_of,
    describe,
    format_share,
    series_keys,
)
from kvatlas.reports.quantities import SHARE, SHARES, percentile_of

Table = dict[SeriesKey, dict[float, dict[SampleId, float]]]

# Numbers of samples are not settings; a budget tells series apart, not studies.
NEVER_SPLIT = frozenset({BUDGET, "n"})
# What older records do not name, because it could not be otherwise.
DEFAULTS: Params = {LINK: NO_LINK, "turns": 1, "linear_weights": "off"}
# Always said beside a swept value; and what captions say, so that conditions need not.
_NAMED = ("trace", "task", "arrivals", LINK)
_OF_THE_MACHINE = {
    *("dtype", "device", "linear_weights", "threads", "kv_memory_bytes", "host_memory_bytes", "max_batched_tokens"),
    *("model_digest", "trace_digest", "pool_tries", PROCESSOR, ACCELERATOR),
}
_TRUST: tuple[Provenance, ...] = ("measured", "emulated", "estimated")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One setting of a series.

    Args:
        x: the swept value; 0 where nothing is swept.
        interval: of all samples taken there; over runs, where a run has many samples.
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
        settings = ((row.strategy, row.params, self.x_of(row.params)) for row in self.rows)
        return series_keys(settings, budget_swept=self.swept == BUDGET)

    @property
    def constants(self) -> Params:
        """The params on which all rows that name them agree; sample counts and the absence of a link left out."""
        return {name: values[0] for name, values in self._values.items() if len(values) == 1 and _told(name, values[0])}

    @property
    def varied(self) -> dict[str, tuple[int | float | str, ...]]:
        """The params that differ between series without splitting the study; to be told, never hidden."""
        return {name: values for name, values in self._values.items() if len(values) > 1 and name not in self.split}

    @property
    def link(self) -> str:
        """The emulated link's text, or "none"."""
        return str(self.split.get(LINK, self._values.get(LINK, (NO_LINK,))[0]))

    @cached_property
    def _values(self) -> dict[str, tuple[int | float | str, ...]]:
        found: dict[str, dict[int | float | str, None]] = {}
        for params in {id(row.params): row.params for row in self.rows}.values():
            for name, value in params.items():
                if name not in {self.swept, *NEVER_SPLIT}:
                    found.setdefault(name, {})[value] = None
        return {name: tuple(values) for name, values in found.items()}

    def x_of(self, params: Params) -> float:
        """Return the swept value of a point; 0 where nothing is swept."""
        value = params[self.swept] if self.swept else 0
        return float(value)

    def condition(self, x: float) -> str:
        """Return x in words, with what sets this study apart."""
        named = self.set_apart
        if self.swept is None:
            settings = {name: value for name, value in self.constants.items() if name not in _OF_THE_MACHINE}
            return named or describe(settings) or "as run"
        words = CONDITIONS.get(self.swept, f"{self.swept} {{:,.10g}}").format(x)
        if self.swept == BUDGET:
            words = f"{format_share(x)} kept"
        return f"{words}, {named}" if named else words

    @property
    def set_apart(self) -> str:
        """What tells this study from others, in words: its task, its arrivals, an emulated link; may be ""."""
        return describe(self._apart)

    @property
    def set_apart_on_link(self) -> str:
        """The same without the link."""
        return describe({name: value for name, value in self._apart.items() if name != LINK})

    @property
    def _apart(self) -> Params:
        return {name: self.constants[name] for name in _NAMED if name in self.constants} | self.split

    def samples(self, metric: str) -> Table:
        """Return the raw numbers of a metric: series -> x -> (seed, index) -> value."""
        if metric in _DERIVED:
            return _DERIVED[metric](self)
        tail = percentile_of(metric)
        if tail is not None and metric not in self._stored:
            return self.samples(tail[0])
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
                    Mark(x=x, interval=self._interval(metric, key, x, cell), provenance=trust.get((key, x), "measured"))
                    for x, cell in sorted(cells.items())
                ),
            )
            for key, cells in self.samples(metric).items()
        ]

    def unit(self, metric: str) -> str:
        """Return the unit a metric was stored in; "share" for what is right or wrong."""
        if metric in SHARES:
            return SHARE
        sources = _sources(metric)
        return next((row.unit for row in self.rows if row.metric in sources), "")

    def paired(self, metric: str, key: SeriesKey, x: float, other: SeriesKey | None = None) -> Interval | None:
        """Return the interval of a series minus another, the baseline unless named, on the prompts both have.

        Where the budget is swept, the baseline holds everything and stands at one x only: that is its place. None
        without a shared prompt.
        """
        samples = self.samples(metric)
        other = other or next((one for one in samples if one.name == BASELINE), None)
        if other is None:
            return None
        return paired_interval(self._cell(samples, key, x), self._cell(samples, other, x))

    def failed(self, metric: str, key: SeriesKey, x: float) -> str:
        """Return ``"50 of 64 failed"`` for a latency of a point that lost requests, else "".

        What is left of such a point are the requests that were lucky, so its latencies compare with nobody's.
        """
        tail = percentile_of(metric)
        if (tail[0] if tail else metric) not in LATENCIES:
            return ""
        lost = sum(self._stored.get("failed_requests", {}).get(key, {}).get(x, {}).values())
        served = max(len(self._stored.get(name, {}).get(key, {}).get(x, {})) for name in LATENCIES)
        return f"{lost:,.0f} of {lost + served:,.0f} failed" if lost else ""

    def _interval(self, metric: str, key: SeriesKey, x: float, cell: Samples) -> Interval:
        kind = pooled(self.experiment, metric)
        if not kind:
            return interval_of(metric, cell)
        params = self.constants | ({self.swept: x} if self.swept else {})
        counted = self._stored.get(COUNTED_BY.get(self.experiment, ""), {}).get(key, {}).get(x, {})
        return interval_over_runs(metric, split_runs(self.experiment, cell, params, counted), kind)

    def _cell(self, samples: Table, key: SeriesKey, x: float) -> Samples:
        cells = samples.get(key, {})
        anywhere = self.swept == BUDGET and key.name == BASELINE and cells
        return cells[max(cells)] if anywhere else cells.get(x, {})

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
        sources = _sources(metric)
        for row in self.rows:
            if row.metric in sources:
                mark = (self._key(row), self.x_of(row.params))
                found[mark] = max(found.get(mark, "measured"), row.provenance, key=_TRUST.index)
        return found


def _cache_after_prefill(study: Study) -> Table:
    """Return KV bytes plus sidecar bytes, the memory a strategy really needs."""
    sidecars = study.samples("sidecars_after_prefill")
    return _combine(study.samples("kv_after_prefill"), sidecars, lambda kv, beside: kv + beside)


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


def _sources(metric: str) -> tuple[str, ...]:
    """Return the stored metrics that one is computed from."""
    tail = percentile_of(metric)
    return _SOURCES.get(metric, (metric, tail[0]) if tail else (metric,))


def _told(name: str, value: object) -> bool:
    """Whether a caption should name the param: that there is no link goes without saying."""
    return name not in DEFAULTS or value != DEFAULTS[name]


_DERIVED = {"cache_after_prefill": _cache_after_prefill}
_SOURCES = {"cache_after_prefill": ("kv_after_prefill", "sidecars_after_prefill")}
