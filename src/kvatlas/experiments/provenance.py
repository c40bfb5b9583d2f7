"""Mark what an emulated link has slowed: such times are neither this machine's nor a real link's."""

from __future__ import annotations

from collections.abc import Iterable

from kvatlas.core.vocabulary import Axis
from kvatlas.records.schema import Point, Sample
from kvatlas.strategies.strategy import Strategy

_UNITS = frozenset({"s", "CPU-s", "tokens/s", "tokens/CPU-s", "requests/s", "tokens/s/GB"})
_RATIOS = frozenset({"hidden_share", "transfer_to_compute", "bound_reached"})
_TIMELINE = frozenset({"timeline_start", "timeline_end"})


def moves_data(strategy: str) -> bool:
    """Return whether a strategy keeps data on another tier, so that its steps move some."""
    return any(stage.axis == Axis.PLACE for stage in Strategy.parse(strategy).stages)


def emulated(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples with those that depend on time marked as emulated."""
    return [
        sample.model_copy(update={"provenance": "emulated"}) if depends_on_time(sample) else sample
        for sample in samples
    ]


def depends_on_time(sample: Sample) -> bool:
    """Return whether a slower link changes the value."""
    return sample.unit in _UNITS or sample.metric in _RATIOS | _TIMELINE


def marked(samples: Iterable[Sample], point: Point, link: str, moved: bool = False) -> list[Sample]:
    """Return the samples of a point, marked where an emulated link took part.

    Args:
        samples: as measured.
        point: what they are of.
        link: "none", or the rate that was emulated.
        moved: whether data was moved although the strategy does not place any elsewhere: caches were swapped.
    """
    if link == "none" or not (moved or moves_data(point.strategy)):
        return list(samples)
    return emulated(samples)
