"""The line under every figure: model, role, dtype, hardware, constants, n and kind of interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvatlas.core.units import format_bytes
from kvatlas.records.schema import ACCELERATOR, PROCESSOR, Facts, Params, RunManifest
from kvatlas.reports.labels import describe, listed
from kvatlas.reports.series import Series, Study

# The manifest says these in other words.
_TOLD = frozenset({"dtype", "device", PROCESSOR, ACCELERATOR})
ROLES = {"quality": "quality: trained, small", "speed": "speed: random weights, real shape"}


def caption(shown: Study | Sequence[Study], series: Iterable[Series], runs: Sequence[RunManifest]) -> str:
    """Return the caption of a figure that shows these series of one study, or of several side by side."""
    studies = [shown] if isinstance(shown, Study) else list(shown)
    ids = {run_id for study in studies for run_id in study.run_ids}
    mine = [run for run in runs if run.run_id in ids]
    models = list(dict.fromkeys(study.model for study in studies))
    parts = [
        f"Model{'s' if len(models) > 1 else ''} {listed(models)} ({ROLES[studies[0].model_role]})",
        _dtypes(models, mine),
        listed(dict.fromkeys(hardware(run.hardware) for run in mine)) or "hardware not recorded",
        describe({name: value for name, value in _shared(studies).items() if name not in _TOLD}),
        listed(dict.fromkeys(varied(study) for study in studies)),
        samples_text(series),
    ]
    return ". ".join(part for part in parts if part) + "."


def varied(study: Study) -> str:
    """Return which conditions differ between the series of a study, or ""."""
    return "; ".join(
        f"differs between series: {' or '.join(describe({name: value}) for value in values)}"
        for name, values in study.varied.items()
    )


def _shared(studies: Sequence[Study]) -> Params:
    """Return the conditions that hold for all that is shown."""
    settings = [study.constants | study.split for study in studies]
    return {name: value for name, value in settings[0].items() if all(one.get(name) == value for one in settings)}


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


def tiers_text(runs: Iterable[RunManifest]) -> str:
    """Return what host and device mean without a GPU, or "" where there is one."""
    if {run.hardware.get("device") for run in runs} != {"cpu"}:
        return ""
    return (
        "There is no GPU here: the device is the CPU, so both tiers are RAM of one machine. A move between them is a "
        "real copy, but crosses no bus; only an emulated link slows it down, and whatever rests on one says so."
    )


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


def _dtypes(models: Sequence[str], runs: Sequence[RunManifest]) -> str:
    found = [run.models.get(model, {}).get("dtype") for run in runs for model in models]
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in found if dtype)
    return f"dtype {listed(names)}" if names else "dtype not recorded"
