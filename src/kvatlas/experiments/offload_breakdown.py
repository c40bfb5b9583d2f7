"""Where do the memory and the time of an offloading strategy go?

The study (arXiv:2604.05012, known here second-hand): InfiniGen holds the whole cache on the host beside pinned transfer
buffers, and its per-token fetches are not hidden by compute, so their cost never pays off. Expected here: a decode step
cannot be much shorter than the longer of its compute and its moves; prefetching approaches that bound, speculation
lowers the moves. The limit is the link, or memory bandwidth where the link is RAM.

Only strategies that place keys and values on the host are measured, with `full` beside them for scale. Steps are timed
in one run; what they would compute without any move is timed in another, of the same request under `full`, because
moves slow the compute beside them; how good speculation was is observed in a third, because the comparison with exact
scores takes time. On random weights attention is nearly flat, so that what speculation finds there says nothing of
trained models.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvatlas.core.errors import CapacityError
from kvatlas.core.observer import SpanKind
from kvatlas.core.timeline import Event, Timeline
from kvatlas.core.vocabulary import Axis
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.experiments.asking import encoder
from kvatlas.experiments.experiment import REPEATED, Experiment, Lab, Settings
from kvatlas.experiments.holdings import holdings
from kvatlas.experiments.load import random_prompt
from kvatlas.experiments.provenance import marked, moves_data
from kvatlas.experiments.settings import NO_LINK, link_name
from kvatlas.records.schema import Point, Sample
from kvatlas.strategies.strategy import Strategy
from kvatlas.workloads.recall import read_filler

TIMELINE_KINDS = (SpanKind.FETCH, SpanKind.STORE, SpanKind.WAIT, SpanKind.ATTEND, SpanKind.SELECT)
"""Kinds of events in ``timeline_kind``: the sample's value is the place in this list."""

_OBSERVED_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decode step and what happened in it; seconds.

    Args:
        start_s: when it began.
        end_s: when it ended.
        events: all that began in it, moves included.
    """

    start_s: float
    end_s: float
    events: tuple[Event, ...]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s

    def spent(self, kind: SpanKind) -> float:
        """Return the time of all events of a kind."""
        return sum(event.seconds for event in self.events if event.kind == kind)


class OffloadBreakdown(Experiment):
    """Bytes by part and tier, and the time of a decode step by what it was spent on."""

    name = "offload_breakdown"
    question = "Where do the memory and the time of an offloading strategy go?"
    role = "speed"
    own = REPEATED | {"breakdown_prompt_tokens", "breakdown_output_tokens", "breakdown_links", "breakdown_model"}

    def reads(self, settings: Settings) -> frozenset[str]:
        """Return what all of them read and its own; it has links of its own, and may have a model of its own."""
        return super().reads(settings) - {"link"} - ({"speed_model"} if settings.breakdown_model else frozenset())

    def sources(self, settings: Settings) -> tuple[str | None, ...]:
        """Return its own model where the settings name one."""
        return (settings.breakdown_model or settings.speed_model,)

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield every link and prompt length under `full` and every strategy that offloads; none without such."""
        offloading = [strategy for strategy in settings.strategies if moves_data(strategy)]
        for link in settings.breakdown_links:
            for prompt_tokens in sorted(settings.breakdown_prompt_tokens):
                for strategy in ("full", *offloading) if offloading else ():
                    yield self.point(
                        model,
                        strategy,
                        prompt_tokens=prompt_tokens,
                        output_tokens=settings.breakdown_output_tokens,
                        link=link_name(link),
                    )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return bytes and compute per repeat, times per decode step, and the timeline of the median step.

        Raises:
            CapacityError: prompt and output do not fit.
        """
        samples: list[Sample] = []
        alone: list[Sample] = []
        steps: list[Step] = []
        for repeat in lab.repeats():
            memory, found = _run(point, lab, repeat)
            samples += memory
            compute = _compute(point, lab, repeat) if moves_data(point.strategy) else None
            if compute is not None:
                alone.append(Sample(metric="compute_time", unit="s", value=compute, index=repeat))
            for number, step in enumerate(found, start=len(steps)):
                samples += _times(step, number, compute)
            steps += found
        samples += _timeline(sorted(steps, key=lambda step: step.seconds)[len(steps) // 2])
        if any(stage.axis == Axis.ATTEND for stage in Strategy.parse(point.strategy).stages):
            samples += _observe(point, lab)
        # nothing was moved where compute was timed
        return marked(samples, point, str(point.params["link"])) + alone


def _run(point: Point, lab: Lab, repeat: int) -> tuple[list[Sample], list[Step]]:
    """Return the bytes of one repeat, and its decode steps."""
    engine = lab.engine(point, link=str(point.params["link"]))
    request = _begin(engine, point, lab.settings.seed + repeat)
    samples = _memory(engine, request, repeat)
    steps = _decode(engine, request)
    samples.append(Sample(metric="device_peak", unit="bytes", value=engine.peak_used_bytes, index=repeat))
    samples.append(Sample(metric="host_peak", unit="bytes", value=engine.peak_host_bytes, index=repeat))
    return samples, steps


def _begin(engine: Engine, point: Point, seed: int) -> Request:
    """Process the prompt and return the request when its first token is there."""
    params = SamplingParams(max_tokens=int(point.params["output_tokens"]), ignore_eos=True)
    request = engine.add_request(_prompt(engine, int(point.params["prompt_tokens"]), seed), params, point.strategy)
    while not request.token_times_s:
        engine.step()
    return request


def _prompt(engine: Engine, length: int, seed: int) -> list[int]:
    """Return text where the model can read, since what speculation finds depends on it; else random tokens."""
    rng = random.Random(seed)
    if engine.model.tokenizer is None:
        return random_prompt(rng, engine.store.lanes.shape.vocab_size, length)
    text = encoder(engine.model)(read_filler())
    start = rng.randrange(len(text))
    return [text[(start + place) % len(text)] for place in range(length)]


def _memory(engine: Engine, request: Request, repeat: int) -> list[Sample]:
    assert request.seq is not None
    held = holdings(engine.store, request.seq)
    parts = {
        "device_kv": held.device_kv,
        "device_sketch": held.device_sketch,
        "device_staging": held.device_staging,
        "device_sidecars": held.device_sidecars,
        "host_kv": held.host_kv,
    }
    return [Sample(metric=name, unit="bytes", value=value, index=repeat) for name, value in parts.items()]


def _decode(engine: Engine, request: Request) -> list[Step]:
    """Run the request to its end and return its decode steps."""
    engine.observer = timeline = Timeline()
    while request.finish_reason is None:
        engine.step()
    return steps_of(timeline.events)


def steps_of(events: Sequence[Event]) -> list[Step]:
    """Return the forwards of a timeline, in order, each with the events that began in it."""
    whole = sorted((event for event in events if event.kind == SpanKind.FORWARD), key=lambda event: event.start_s)
    parts = sorted((event for event in events if event.kind != SpanKind.FORWARD), key=lambda event: event.start_s)
    return [
        Step(
            start_s=step.start_s,
            end_s=step.end_s,
            events=tuple(event for event in parts if step.start_s <= event.start_s < step.end_s),
        )
        for step in whole
    ]


def _compute(point: Point, lab: Lab, repeat: int) -> float | None:
    """Return the median decode step of a repeat's request under `full`; None if it does not fit on the device."""
    full = point.model_copy(update={"strategy": "full"})
    try:
        engine = lab.engine(full, link=NO_LINK)
        request = _begin(engine, full, lab.settings.seed + repeat)
    except CapacityError:
        return None
    return statistics.median(step.seconds for step in _decode(engine, request))


def _times(step: Step, number: int, compute: float | None) -> list[Sample]:
    """Return where the time of a step went; ratios only if something was moved.

    Args:
        step: the step.
        number: its place among those of all repeats.
        compute: seconds that a step takes without any move, or None where that is not known.
    """
    attend, speculate, wait = map(step.spent, (SpanKind.ATTEND, SpanKind.SELECT, SpanKind.WAIT))
    fetch, store = step.spent(SpanKind.FETCH), step.spent(SpanKind.STORE)
    transfer = max(fetch, store)  # both directions are busy at once
    seconds = {
        "step_time": step.seconds,
        "attend_time": attend,
        "speculate_time": speculate,
        "wait_time": wait,
        "fetch_time": fetch,
        "store_time": store,
        "transfer_time": transfer,
        "other_time": step.seconds - attend - speculate - wait,
    }
    samples = [Sample(metric=name, unit="s", value=value, index=number) for name, value in seconds.items()]
    if transfer > 0:
        ratios = {"hidden_share": 1 - wait / (fetch + store)}
        if compute is not None:
            ratios["transfer_to_compute"] = transfer / compute
            ratios["bound_reached"] = max(compute, transfer) / step.seconds
        samples += [Sample(metric=name, unit="", value=value, index=number) for name, value in ratios.items()]
    return samples


def _timeline(step: Step) -> list[Sample]:
    """Return the events of one step; samples of equal index are of one event."""
    samples = []
    shown = [event for event in step.events if event.kind in TIMELINE_KINDS]
    for index, event in enumerate(shown):
        fields = {
            ("timeline_kind", ""): TIMELINE_KINDS.index(event.kind),
            ("timeline_layer", ""): event.layer,
            ("timeline_start", "s"): event.start_s - step.start_s,
            ("timeline_end", "s"): event.end_s - step.start_s,
        }
        samples += [
            Sample(metric=metric, unit=unit, value=value, index=index) for (metric, unit), value in fields.items()
        ]
    return samples


def _observe(point: Point, lab: Lab) -> list[Sample]:
    """Return how good speculation was over the first decode steps of a run of its own."""
    engine = lab.engine(point, link=NO_LINK)  # nothing is timed
    request = _begin(engine, point, lab.settings.seed)
    engine.observe_selection()
    while request.finish_reason is None and len(request.token_times_s) <= _OBSERVED_STEPS:
        engine.step()
    engine.cancel(request)
    seen = engine.probe
    if seen is None or not seen.count:
        return []
    found = {
        "speculation_recall": seen.recall,
        "speculation_mass": seen.mass,
        "selected_fraction": seen.selected_fraction,
    }
    return [Sample(metric=name, unit="", value=value) for name, value in found.items()]
