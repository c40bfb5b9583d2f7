"""The line under every figure: model, role, dtype, hardware, constants, n and kind of interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvatlas.core.units import format_bytes
from kvatlas.records.schema import Facts, RunManifest
from kvatlas.reports.labels import describe, listed
from kvatlas.reports.series import Series, Study

ROLES = {"quality": "quality: trained, small", "speed": "speed: random weights, real shape"}


def caption(study: Study, series: Iterable[Series], runs: Sequence[RunManifest]) -> str:
    """Return the caption of a figure that shows these series of the study."""
    mine = [run for run in runs if run.run_id in study.run_ids]
    parts = [
        f"Model {study.model} ({ROLES[study.model_role]})",
        _dtypes(study, mine),
        listed(dict.fromkeys(hardware(run.hardware) for run in mine)) or "hardware not recorded",
        describe(study.constants | study.split),
        samples_text(series),
    ]
    return ". ".join(part for part in parts if part) + "."


def samples_text(series: Iterable[Series]) -> str:
    """Return ``"n = 5 per mark; bars: median, smallest and largest of 5, 94%"``."""
    intervals = [mark.interval for one in series for mark in one.marks]
    counts = sorted({interval.n for interval in intervals})
    if not counts:
        return ""
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    methods = dict.fromkeys(interval.method for interval in intervals if interval.n > 1)
    text = f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{number} per mark"
    if methods:  # in the order of appearance; more than three would not fit a caption
        text += f"; bars: {' / '.join(list(methods)[:3])}".replace(">=", "≥")
    return f"{text}; hollow marks: n = 1, no interval" if counts[0] == 1 else text


def hardware(facts: Facts) -> str:
    """Return the processor, the threads it offers, the memory and the device, as far as recorded."""
    threads = facts.get("usable_threads") or facts.get("threads")
    memory = facts.get("memory_bytes")
    parts = [
        str(facts.get("cpu_model") or "CPU not recorded"),
        f"{threads} hardware threads" if threads else "",
        format_bytes(float(memory)) if isinstance(memory, int | float) else "",
        f"device {facts['device']}" if facts.get("device") else "",
    ]
    return ", ".join(part for part in parts if part)


def _dtypes(study: Study, runs: Sequence[RunManifest]) -> str:
    found = [run.models.get(study.model, {}).get("dtype") for run in runs]
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in found if dtype)
    return f"dtype {listed(names)}" if names else "dtype not recorded"
