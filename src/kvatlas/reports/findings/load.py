"""Findings 3 to 7: memory, throughput, latency and output length, as ratios between the study's three systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvatlas.metrics.statistics import Interval
from kvatlas.records.schema import PointRecord
from kvatlas.reports.findings.cast import NAMES, Ratio, growth_part, play, ratio_part
from kvatlas.reports.findings.rules import EQUAL, Outcome, Part, judge_effect, judge_equal, untested, widened
from kvatlas.reports.labels import told
from kvatlas.reports.published import CONCURRENCY, OUTPUT_TOKENS
from kvatlas.reports.quantities import format_quantity
from kvatlas.reports.series import Study

_AT_96 = f"{CONCURRENCY} at once"
_MILD = 2.0
_HOST_FACTOR = 2.5


def device_memory(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 3: H2O needs about half of the full cache's device memory, InfiniGen about as much as H2O."""
    half = Ratio(
        statement="H2O needs roughly half of vLLM's device memory, at best 70 % less",
        published="0.3x to 0.5x",
        metric="device_peak",
        over="h2o",
        under="full",
        judge=lambda found: judge_effect(found, widened(0.3, 0.5), 1),
        published_range=(0.3, 0.5),
        scale=_AT_96,
    )
    near = Ratio(
        statement="InfiniGen's device memory is near H2O's",
        published="about 1x",
        metric="device_peak",
        over="infinigen",
        under="h2o",
        judge=_equal,
        published_range=(1.0, 1.0),
        scale=_AT_96,
    )
    return [ratio_part(study, half), ratio_part(study, near)]


def host_memory(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 4: InfiniGen's host memory is at least 2.5 times the others'."""
    statement, published = "InfiniGen needs at least 2.5 times the others' host memory", "at least 2.5x"
    series = study.series("host_peak")
    mine = play(series, "infinigen")
    others = [one for one in (play(series, "full"), play(series, "h2o")) if one is not None]
    if mine is None or not others:
        return [
            untested(statement, published, f"not measured here: {NAMES['infinigen'] if not mine else 'the others'}")
        ]
    shared = set.intersection(*({mark.x for mark in one.marks} for one in (mine, *others)))
    if not shared:
        return [untested(statement, published, "no setting that all ran")]
    x = max(shared)
    top = mine.at(x)
    most = max((one.at(x) for one in others), key=lambda mark: mark.interval.high if mark else 0.0)
    assert top is not None and most is not None
    where = f"{told(mine.key.name)}, {study.condition(x)} (the study: {_AT_96})"
    if most.interval.high > 0:
        ratio = Ratio(
            statement=statement,
            published=published,
            metric="host_peak",
            over="infinigen",
            under=next(role for role in ("full", "h2o") if (found := play(series, role)) and found.at(x) is most),
            judge=_at_least,
            published_range=(_HOST_FACTOR, _HOST_FACTOR),
            scale=_AT_96,
        )
        return [ratio_part(study, ratio)]
    held = format_quantity(top.interval.estimate, mine.unit)
    note = (
        "here only the host tier counts, which the others leave empty by definition; the study counted all CPU memory"
    )
    measured = f"{held} against none (n = {top.interval.n})"
    return [untested(statement, published, f"{note}; {where}", measured=measured)]


def throughput(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 5: H2O decodes like the full cache, InfiniGen ten times slower; H2O wins per GB."""
    metric = "decode_throughput" if study.samples("decode_throughput") else "output_throughput"
    like = Ratio(
        statement="H2O's peak decode throughput is similar to vLLM's",
        published="about 1x",
        metric=metric,
        over="h2o",
        under="full",
        judge=_equal,
        published_range=(1.0, 1.0),
        scale=_AT_96,
    )
    tenth = Ratio(
        statement="InfiniGen decodes about ten times slower than vLLM",
        published="about 0.1x",
        metric=metric,
        over="infinigen",
        under="full",
        judge=_about(0.1),
        published_range=(0.1, 0.1),
        scale=_AT_96,
    )
    per_gb = [
        Ratio(
            statement=f"H2O's throughput per GB of device memory is about three times vLLM's ({of_what})",
            published="about 3x",
            metric=metric,
            over="h2o",
            under="full",
            judge=_about(3),
            published_range=(3.0, 3.0),
            scale=_AT_96,
        )
        for metric, of_what in (
            ("throughput_per_live_gb", "live device memory"),
            ("throughput_per_pool_gb", "smallest pool"),
        )
    ]
    return [ratio_part(study, ratio) for ratio in (like, tenth, *per_gb)]


def latency(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 6: the full cache's request latency is flat, H2O's grows mildly, InfiniGen's is 14 times worse."""
    flat = Ratio(
        statement="vLLM's request latency is flat as requests join",
        published="about 1x from 16 to 96",
        metric="e2e_p50",
        over="full",
        under="full",
        judge=_equal,
        published_range=(1.0, 1.0),
        scale="96 over 16",
    )
    mild = Ratio(
        statement=f"H2O's request latency grows mildly (read as: at most {_MILD:g}x)",
        published="mild growth",
        metric="e2e_p50",
        over="h2o",
        under="h2o",
        judge=lambda found: judge_equal(found, (1 / EQUAL, _MILD)),
        scale="96 over 16",
    )
    worse = Ratio(
        statement="InfiniGen's request latency is up to 14 times vLLM's",
        published="up to 14x",
        metric="e2e_p50",
        over="infinigen",
        under="full",
        judge=_about(14),
        published_range=(14.0, 14.0),
        scale=_AT_96,
    )
    return [growth_part(study, flat), growth_part(study, mild), ratio_part(study, worse)]


def long_output(study: Study, points: Sequence[PointRecord]) -> list[Part]:
    """Return finding 7: at 8,192 output tokens InfiniGen takes 17 times as long, H2O three times."""
    scale = f"{OUTPUT_TOKENS:,} output tokens after a prompt of 10K"
    ratios = [
        Ratio(
            statement=f"{name} takes about {times} times vLLM's time for a long output",
            published=f"about {times}x",
            metric="decode_time",
            over=role,
            under="full",
            judge=_about(times),
            published_range=(times, times),
            scale=scale,
        )
        for role, name, times in (("infinigen", "InfiniGen", 17), ("h2o", "H2O", 3))
    ]
    return [ratio_part(study, ratio) for ratio in ratios]


def _about(times: float) -> Callable[[Interval], Outcome]:
    return lambda found: judge_effect(found, widened(times, times), 1)


def _equal(found: Interval) -> Outcome:
    return judge_equal(found, (1 / EQUAL, EQUAL))


def _at_least(found: Interval) -> Outcome:
    """Judge "at least 2.5 times": any larger ratio is the finding, too."""
    return judge_effect(found, (_HOST_FACTOR, float("inf")), 1)
