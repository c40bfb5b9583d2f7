"""What a family of figures is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvatlas.records.schema import PointRecord, RunManifest
from kvatlas.reports.figures.theme import Palette
from kvatlas.reports.series import Study


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The studies of one experiment that may stand side by side, and all that surrounds them.

    Args:
        studies: at least one; the same experiment and role.
        palette: colours of the whole report.
        runs: manifests, for captions.
        points: how every point of the records ended, for the limits of sweeps.
        suffix: keeps the names of several scenes apart; may be "".
    """

    studies: tuple[Study, ...]
    palette: Palette
    runs: Sequence[RunManifest]
    points: Sequence[PointRecord] = ()
    suffix: str = ""

    @property
    def study(self) -> Study:
        """The first study; the only one where a family draws each for itself."""
        return self.studies[0]

    def of(self, study: Study, suffix: str) -> Scene:
        """Return the scene of one study alone."""
        return replace(self, studies=(study,), suffix=suffix)
