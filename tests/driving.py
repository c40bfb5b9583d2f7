"""What tests share with those of strategies of others; see `kvatlas.testing`."""

from __future__ import annotations

from kvatlas.testing.driving import (
    STEP_LIMIT,
    Job,
    assert_empty,
    check,
    drive,
    finish,
    force,
    kept_positions,
    loaded,
    relative_error,
)

__all__ = [
    "STEP_LIMIT",
    "Job",
    "assert_empty",
    "check",
    "drive",
    "finish",
    "force",
    "kept_positions",
    "loaded",
    "relative_error",
]
