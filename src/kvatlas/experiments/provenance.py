"""Mark what an emulated link has changed: such figures are neither this machine's nor a real link's."""

from __future__ import annotations

from collections.abc import Iterable

from kvatlas.core.vocabulary import Axis
from kvatlas.records.schema import Point, Sample
from kvatlas.strategies.strategy import Strategy

_UNITS = frozenset({"s", "CPU-s", "tokens/s", "tokens/CPU-s", "requests/s", "tokens/s/GB"})
_COUNTS = frozenset({"preemptions", "swaps"})
_RATIOS = frozenset({"hidden_share", "transfer_to_compute", "bound_reached"})
_TIMELINE = frozenset({"timeline_start", "timeline_end"})


def moves_data(strategy: str) -> bool:
    """Return whether a strategy keeps data on another tier, so that its steps move some."""
    return any(stage.axis == Axis.PLACE for stage in Strategy.parse(strategy).stages)


def emulated(samples: Iterable[Sample], *, every: bool = False) -> list[Sample]:
    """Return the samples with those that depend on time, or all of them, marked as emulated."""
    return [
        sample.model_copy(update={"provenance": "emulated"}) if every or depends_on_time(sample) else sample
        for sample in samples
    ]


def depends_on_time(sample: Sample) -> bool:
    """Return whether a slower link changes the value."""
    return sample.unit in _UNITS | _COUNTS or sample.metric in _RATIOS | _TIMELINE


def marked(
    samples: Iterable[Sample], point: Point, link: str, *, moved: bool = False, timed: bool = False
) -> list[Sample]:
    """Return the samples of a point, marked where an emulated link took part.

    Args:
        samples: as measured.
        point: what they are of.
        link: "none", or the rate that was emulated.
        moved: whether data was moved although the strategy does not place any elsewhere: caches were swapped.
        timed: whether requests arrived at times of their own: then the link decides how many are alive together, and
            so changes bytes and counts too.
    """
    if link == "none" or not (moved or moves_data(point.strategy)):
        return list(samples)
    return emulated(samples, every=timed)
