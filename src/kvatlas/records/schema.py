"""What a records file holds: runs (who, when, on what), points (one setting each) and samples (raw numbers).

Reports read nothing else, so every figure can be redrawn from stored data. A sample is never an average:
repeats are kept one by one; equal indices mean the same prompt or repeat, so strategies compare in pairs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ModelRole = Literal["quality", "speed"]
Provenance = Literal["measured", "estimated", "emulated"]
PointStatus = Literal["done", "failed", "refused"]
Params = dict[str, int | float | str]
Facts = dict[str, bool | int | float | str | None]
Name = Annotated[str, Field(min_length=1)]

PROCESSOR, ACCELERATOR = "processor", "accelerator"
"""Params of a point that name the hardware it was measured on; the manifest calls them ``cpu_model`` and ``device``."""

_MAX_SEED = 2**63 - 1


class _Frozen(BaseModel):
    """Base of the schema: immutable, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunManifest(_Frozen):
    """Everything needed to repeat a run, or to doubt it.

    Args:
        run_id: unique name of the run.
        started_at: UTC, ISO 8601, ``2026-11-21T02:15:00+00:00``.
        command: the command line, as typed.
        commit: git commit of the kvatlas sources, or None where they are not a checkout.
        commit_dirty: True when the checkout had uncommitted changes; None without a checkout.
        seed: the run's seed, 0 <= seed < 2**63.
        versions: package or part -> version ("not installed" where absent).
        hardware: cpu model, cores, threads, memory in bytes, device.
        models: model name -> facts (parameters, layers, source ...).
    """

    run_id: Name
    started_at: str
    command: str
    commit: str | None
    commit_dirty: bool | None
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)]
    versions: dict[str, str]
    hardware: Facts
    models: dict[str, Facts] = {}

    @field_validator("started_at")
    @classmethod
    def _is_utc(cls, text: str) -> str:
        if datetime.fromisoformat(text).utcoffset() != timedelta(0):
            raise ValueError(f"started_at {text!r} is not UTC; end it with +00:00")
        return text


class Point(_Frozen):
    """One setting that an experiment measures: the unit of writing and of resuming.

    Args:
        experiment: which experiment asks.
        model: name of the model, a key of the manifest's ``models``.
        model_role: "quality" (trained, small) or "speed" (random weights, real shape).
        strategy: the strategy's sentence, such as ``snapkv(budget=1024)``.
        params: the swept values, such as ``prompt_tokens=2048``; booleans are kept as 0 or 1.
    """

    experiment: Name
    model: Name
    model_role: ModelRole
    strategy: Name
    params: Params = {}

    @field_validator("params", mode="before")
    @classmethod
    def _plain(cls, params: object) -> object:
        if not isinstance(params, dict):
            return params
        values = {name: value.item() if hasattr(value, "item") else value for name, value in params.items()}
        return {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}

    @property
    def key(self) -> str:
        """16 hexadecimal digits that depend on content alone: not on the order of params; 1 equals 1.0."""
        params = {name: _canonical(value) for name, value in self.params.items()}
        parts = [self.experiment, self.model, self.model_role, self.strategy, params]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Sample(_Frozen):
    """One raw number.

    Args:
        metric: name of the metric, such as ``ttft``.
        unit: its unit, such as ``s``; "" for a plain ratio.
        value: finite.
        index: number of the repeat or prompt, unique per metric and point; pairs samples across strategies.
        provenance: measured here, estimated by a formula, or measured on an emulated link or device.
    """

    metric: Name
    unit: str
    value: float
    index: Annotated[int, Field(ge=0, le=_MAX_SEED)] = 0
    provenance: Provenance = "measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A sample with the point and run it belongs to, flat, for reports.

    ``params`` is shared between the rows of one point: read it, do not change it.
    """

    run_id: str
    point_key: str
    experiment: str
    model: str
    model_role: ModelRole
    strategy: str
    params: Params
    seed: int
    metric: str
    unit: str
    value: float
    index: int
    provenance: Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class PointRecord:
    """A stored point: how it ended, and in which run.

    Args:
        point: the setting.
        seed: seed of the run that wrote it.
        run_id: that run.
        status: done, failed or refused.
        reason: what is missing or went wrong, one line; "" for done.
        written_at: UTC, ISO 8601.
    """

    point: Point
    seed: int
    run_id: str
    status: PointStatus
    reason: str
    written_at: str


def _canonical(value: int | float | str) -> int | float | str:
    """Return integral floats as integers, so that 1 and 1.0 give one key."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
