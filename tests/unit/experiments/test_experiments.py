"""Every experiment on tiny settings: the points it names, the metrics it promises, and what they must obey."""

import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from tests.unit.experiments.tiny import H2O, INFINIGEN, OFFLOAD, TINY, samples_of

from kvatlas.core.errors import CapacityError, ConfigError
from kvatlas.core.observer import SpanKind
from kvatlas.core.timeline import Event
from kvatlas.experiments.decode_throughput import find_smallest_pool
from kvatlas.experiments.early_fact import in_turns
from kvatlas.experiments.lab import Lab
from kvatlas.experiments.load import Observation, drive, random_prompt
from kvatlas.experiments.offload_breakdown import TIMELINE_KINDS, Step, _times, steps_of
from kvatlas.experiments.sweep import EXPERIMENTS
from kvatlas.experiments.traffic import arrival_times
from kvatlas.strategies.strategy import Strategy
from kvatlas.workloads.recall import RecallPrompt

FULL, OFFLOADED = str(Strategy.parse("full")), str(Strategy.parse(OFFLOAD))

_LATENCIES = {"ttft": "s", "tpot": "s", "e2e": "s"}
_RATES = {"goodput": "requests/s", "request_throughput": "requests/s", "output_throughput": "tokens/s"}
_MEMORY = {
    "kv_peak": "bytes",
    "preemptions": "preemptions",
    "peak_running": "requests",
    "cached_prompt_tokens": "tokens",
}
METRICS = {
    "prompt_length": {
        "ttft": "s",
        "prefill_cpu": "s",
        "kv_peak": "bytes",
        "host_peak": "bytes",
        "kv_after_prefill": "bytes",
        "sidecars_after_prefill": "bytes",
    },
    "concurrency_memory": {
        "device_peak": "bytes",
        "host_peak": "bytes",
        "peak_running": "requests",
        "preemptions": "preemptions",
        "swaps": "swaps",
    },
    "decode_throughput": {
        "output_throughput": "tokens/s",
        "output_throughput_cpu": "tokens/CPU-s",
        "decode_throughput": "tokens/s",
        "throughput_per_live_gb": "tokens/s/GB",
        "throughput_per_pool_gb": "tokens/s/GB",
        "smallest_pool": "bytes",
        "smallest_pool_resolution": "bytes",
    },
    "request_latency": _LATENCIES,
    "output_length": {"decode_time": "s", "tpot": "s"},
    "accuracy_budget": {"correct": "", "kv_after_prefill": "bytes"},
    "early_fact": {"correct": "", "kv_after_prefill": "bytes"},
    "request_rate": _LATENCIES | _RATES | _MEMORY,
    "trace_replay": _LATENCIES | _RATES | _MEMORY,
    "model_size": {
        "ttft": "s",
        "tpot": "s",
        "output_throughput": "tokens/s",
        "device_peak": "bytes",
        "weights_bytes": "bytes",
    },
}
PARAMS = {
    "prompt_length": ["prompt_tokens"],
    "offload_breakdown": ["prompt_tokens", "output_tokens", "link"],
    "concurrency_memory": ["concurrency", "prompt_tokens", "output_tokens", "kv_memory_bytes"],
    "decode_throughput": ["concurrency", "prompt_tokens", "output_tokens", "kv_memory_bytes", "pool_tries"],
    "request_latency": ["concurrency", "prompt_tokens", "output_tokens", "kv_memory_bytes"],
    "output_length": ["prompt_tokens", "output_tokens"],
    "accuracy_budget": ["task", "context_tokens", "budget", "n"],
    "early_fact": ["context_tokens", "turns", "num_keys", "budget", "n"],
    "request_rate": [
        *("arrivals", "rate", "requests", "prompt_tokens", "output_tokens", "kv_memory_bytes", "slo"),
    ],
    "trace_replay": [
        *("trace", "requests", "time_scale", "length_scale", "max_prompt_tokens", "kv_memory_bytes", "slo"),
    ],
    "model_size": ["prompt_tokens", "output_tokens", "batch"],
}


def by_metric(samples):
    found = defaultdict(list)
    for sample in samples:
        found[sample.metric].append(sample.value)
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_points_name_what_was_varied(name):
    experiment = EXPERIMENTS[name]
    points = list(experiment.points(TINY, "any"))
    assert points and {point.experiment for point in points} == {name}
    assert all(sorted(point.params) == sorted(PARAMS[name]) for point in points)
    assert len({point.key for point in points}) == len(points)


@pytest.mark.parametrize("name", METRICS)
def test_it_yields_the_metrics_it_promises(name):
    for point, samples in samples_of(name, replace(TINY, strategies=("full", INFINIGEN))):
        assert {sample.metric: sample.unit for sample in samples} == METRICS[name], point
        assert len({(sample.metric, sample.index) for sample in samples}) == len(samples)
        assert {sample.provenance for sample in samples} == {"measured"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_stand_outside_and_strategies_inside(name):
    """A sweep that ends early has compared all strategies at the settings it reached."""
    seen = [
        tuple(sorted(point.params.items()))
        for point in EXPERIMENTS[name].points(replace(TINY, budgets=(0.5, 0.3), prompt_tokens=(64, 32, 48)), "any")
    ]
    assert len(dict.fromkeys(seen)) == 1 + sum(a != b for a, b in pairwise(seen))


def test_short_prompts_come_first():
    points = EXPERIMENTS["prompt_length"].points(TINY, "any")
    assert [point.params["prompt_tokens"] for point in points] == [32] * 4 + [48] * 4


def test_a_prompt_that_cannot_fit_is_refused():
    with pytest.raises(CapacityError, match="needs"):
        samples_of("prompt_length", replace(TINY, prompt_tokens=(20_000,), strategies=("full",)))


def test_where_a_prompt_lies():
    (_, full), (_, offloaded) = samples_of(
        "prompt_length", replace(TINY, prompt_tokens=(64,), strategies=("full", OFFLOAD))
    )
    full, offloaded = by_metric(full), by_metric(offloaded)
    assert full["host_peak"] == [0, 0]
    assert offloaded["host_peak"][0] >= offloaded["kv_after_prefill"][0] == full["kv_after_prefill"][0] > 0


def test_the_breakdown_adds_up():
    found = samples_of("offload_breakdown", replace(TINY, breakdown_prompt_tokens=(96,)))
    assert [point.strategy for point, _ in found] == [str(Strategy.parse(one)) for one in ("full", OFFLOAD, INFINIGEN)]
    for point, samples in found:
        values = by_metric(samples)
        steps = 2 * (TINY.breakdown_output_tokens - 1)
        assert len(values["step_time"]) == steps
        for number in range(steps):
            parts = sum(values[name][number] for name in ("attend_time", "speculate_time", "wait_time", "other_time"))
            assert parts == pytest.approx(values["step_time"][number])
        placed = point.strategy != FULL
        assert (values["host_kv"][0] > 0) == placed
        assert len(values["compute_time"]) == (TINY.repeats if placed else 0)
        for name in ("hidden_share", "transfer_to_compute", "bound_reached"):
            assert len(values[name]) == (steps if placed else 0)
        if placed:
            assert min(values["fetch_time"] + values["store_time"]) > 0
        speculates = "rehearse" in point.strategy
        assert bool(values["speculation_recall"]) == (values["device_sketch"][0] > 0) == speculates
        if speculates:
            assert all(0 < values[name][0] <= 1 for name in ("speculation_recall", "speculation_mass"))
            assert values["selected_fraction"][0] == pytest.approx(0.5, abs=0.05)


def test_times_and_ratios_of_a_step():
    """Moves of both directions run at once; compute is that of a run without any."""
    spans = [
        *((SpanKind.ATTEND, 0, 2), (SpanKind.SELECT, 2, 3), (SpanKind.WAIT, 3, 5)),
        *((SpanKind.FETCH, 0, 5), (SpanKind.STORE, 4, 6), (SpanKind.STORE, 6, 7), (SpanKind.WAIT, 6, 10)),
    ]
    events = tuple(Event(kind=kind, layer=0, start_s=start, end_s=end) for kind, start, end in spans)
    step = Step(start_s=0.0, end_s=10.0, events=events)
    values = {sample.metric: sample.value for sample in _times(step, 0, 4.0)}
    assert values == {
        "step_time": 10,
        "attend_time": 2,
        "speculate_time": 1,
        "wait_time": 6,
        "other_time": 1,
        "fetch_time": 5,
        "store_time": 3,
        "transfer_time": 5,
        "hidden_share": 1 - 6 / 8,
        "transfer_to_compute": 5 / 4,
        "bound_reached": 5 / 10,
    }
    unknown = {sample.metric for sample in _times(step, 0, None)}
    assert values.keys() - unknown == {"transfer_to_compute", "bound_reached"}


def test_no_compute_where_the_full_cache_does_not_fit():
    """What offloading makes possible must not be refused for want of a yardstick."""
    settings = replace(
        TINY, kv_memory="1MiB", breakdown_prompt_tokens=(512,), repeats=1, breakdown_model="random:llama-long"
    )
    with pytest.raises(CapacityError):
        samples_of("offload_breakdown", settings, FULL)
    ((_, samples),) = samples_of("offload_breakdown", settings, OFFLOADED)
    values = by_metric(samples)
    assert values["hidden_share"] and not values["compute_time"] and not values["bound_reached"]


def test_the_timeline_is_of_one_step():
    ((_, samples),) = samples_of("offload_breakdown", TINY, OFFLOADED)
    values = by_metric(samples)
    count = len(values["timeline_kind"])
    assert all(len(values[name]) == count for name in ("timeline_layer", "timeline_start", "timeline_end"))
    kinds = [TIMELINE_KINDS[int(kind)] for kind in values["timeline_kind"]]
    assert kinds.count("attend") == 2 and kinds.count("fetch") == 2
    assert all(0 <= a <= b for a, b in zip(values["timeline_start"], values["timeline_end"], strict=True))
    assert max(values["timeline_start"]) <= max(values["step_time"])


def test_events_belong_to_the_step_in_which_they_begin():
    def event(kind, start, end):
        return Event(kind=kind, layer=0, start_s=start, end_s=end)

    late = event(SpanKind.STORE, 1.5, 3.0)
    events = [
        event(SpanKind.ATTEND, 1.0, 1.2),
        event(SpanKind.FORWARD, 1.0, 2.0),
        event(SpanKind.FORWARD, 2.0, 4.0),
        late,
        event(SpanKind.FETCH, 0.5, 1.1),
    ]
    first, second = steps_of(events)
    assert first == Step(start_s=1.0, end_s=2.0, events=(events[0], late))
    assert (second.seconds, second.events) == (2.0, ())
    assert first.spent(SpanKind.STORE) == 1.5


def test_nothing_to_break_down_without_a_strategy_that_offloads():
    assert list(EXPERIMENTS["offload_breakdown"].points(replace(TINY, strategies=("full", H2O)), "any")) == []


def test_an_emulated_link_marks_the_times_of_what_moves():
    settings = replace(TINY, breakdown_links=("1GB/s,1us",), repeats=1)
    for point, samples in samples_of("offload_breakdown", settings):
        emulated = {sample.metric for sample in samples if sample.provenance == "emulated"}
        if point.strategy == FULL:
            assert not emulated
        else:
            assert {"step_time", "hidden_share", "timeline_start"} <= emulated
            assert not emulated & {"host_kv", "device_peak", "timeline_kind", "speculation_recall", "compute_time"}
        assert point.params["link"] == "1 GB/s, 1 us"


@pytest.mark.parametrize("name", ["request_rate", "trace_replay"])
def test_an_emulated_link_marks_all_that_timed_arrivals_show(name):
    """The link decides how many requests are alive together, and so their bytes."""
    for point, samples in samples_of(name, replace(TINY, link="1GB/s,1us", strategies=("full", OFFLOAD))):
        expected = "measured" if point.strategy == FULL else "emulated"
        assert {sample.provenance for sample in samples} == {expected}


def test_an_emulated_link_marks_preemptions_and_swaps():
    settings = replace(TINY, link="1GB/s,1us", strategies=(OFFLOAD,), repeats=1)
    ((_, samples),) = samples_of("concurrency_memory", settings)
    assert {sample.metric for sample in samples if sample.provenance == "emulated"} == {"preemptions", "swaps"}


def test_another_number_of_tries_is_another_point():
    one, other = (
        [point.key for point in EXPERIMENTS["decode_throughput"].points(replace(TINY, pool_tries=tries), "any")]
        for tries in (1, 2)
    )
    assert not set(one) & set(other)


@pytest.mark.parametrize(("name", "setting"), [("trace_replay", "traces"), ("request_rate", "arrivals")])
def test_a_trace_of_other_content_is_another_point(name, setting, tmp_path):
    path = tmp_path / "t.jsonl"
    settings = replace(TINY, **{setting: (str(path),)})
    keys = []
    for text in ("one", "two", "one"):
        path.write_text(text)
        keys.append([point.key for point in EXPERIMENTS[name].points(settings, "any")])
    assert keys[0] == keys[2]
    assert not set(keys[0]) & set(keys[1])


def test_a_random_prompt():
    drawn = [random_prompt(random.Random(seed), 7, 50) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 50 and set(drawn[0]) == set(range(7))


def test_the_experiments_on_load_share_their_runs():
    lab = Lab(replace(TINY, strategies=("full",)))
    made = []
    drawn = lab.load_arrivals
    lab.load_arrivals = lambda *arguments: made.append(arguments) or drawn(*arguments)
    for name in ("concurrency_memory", "request_latency"):
        (point,) = EXPERIMENTS[name].points(lab.settings, lab.name("random:llama-mini"))
        samples = EXPERIMENTS[name].measure(point, lab)
    assert len(made) == TINY.repeats
    assert len([sample for sample in samples if sample.metric == "e2e"]) == 2 * TINY.repeats


@pytest.mark.parametrize("step_tokens", [512, 16])
def test_tokens_of_steps_that_only_decode(step_tokens):
    """Two prompts of 48 tokens in one chunk or in several; no first token is counted, nor a step beside a prompt."""
    lab = Lab(replace(TINY, max_batched_tokens=step_tokens, strategies=("full",)))
    point = next(EXPERIMENTS["decode_throughput"].points(lab.settings, lab.name("random:llama-mini")))
    engine = lab.engine(point)
    seen = drive(engine, lab.load_arrivals(point, 0, engine), "full")
    alone = 2 * (TINY.concurrency_output_tokens - 1)
    assert seen.decode_tokens == alone if step_tokens == 512 else 0 < seen.decode_tokens < alone
    assert 0 < seen.decode_s < seen.wall_s
    assert seen.decode_throughput == seen.decode_tokens / seen.decode_s


def test_arrivals_of_a_trace_are_stretched_to_the_rate():
    times = arrival_times("azure-conv", 8, rate=4.0, seed=0)
    assert times == sorted(times) and times[-1] == pytest.approx(2.0)
    gaps = {round(later - earlier, 6) for earlier, later in pairwise(times)}
    assert len(gaps) > 2
    with pytest.raises(ConfigError, match="holds 200 requests, 201 are asked for"):
        arrival_times("azure-conv", 201, rate=4.0, seed=0)


def test_the_smallest_pool_is_smaller_for_a_strategy_that_cuts():
    settings = replace(
        TINY, repeats=1, concurrency_prompt_tokens=512, concurrency_output_tokens=8, concurrency=(6,), pool_tries=3
    )
    full, cut = (
        by_metric(samples)
        for _, samples in samples_of("decode_throughput", replace(settings, strategies=("full", H2O)))
    )
    for found in (full, cut):
        assert 0 < found["smallest_pool_resolution"][0] <= found["smallest_pool"][0]
    assert cut["smallest_pool"][0] < full["smallest_pool"][0]


def test_no_smallest_pool_where_the_ample_one_was_too_small():
    lab = Lab(TINY)
    point = next(EXPERIMENTS["decode_throughput"].points(TINY, lab.name("random:llama-mini")))
    assert find_smallest_pool(point, lab, Observation(peak_running=1)) is None


def test_one_model_at_a_time_beside_those_of_the_roles(monkeypatch):
    loaded = []
    monkeypatch.setattr("kvatlas.experiments.lab.load_model", lambda source, **_: loaded.append(source) or object())
    lab = Lab(replace(TINY, models=("random:llama-55m", "random:llama-long")))
    for source in (
        "random:llama-mini",
        "random:llama-55m",
        "random:llama-long",
        "random:llama-mini",
        "random:llama-55m",
    ):
        lab.load(source)
    assert loaded == ["random:llama-mini", "random:llama-55m", "random:llama-long", "random:llama-55m"]


def test_two_models_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "m").mkdir(parents=True)
        (tmp_path / folder / "m" / "config.json").write_text('{"model_type": "llama"}')
    lab = Lab(TINY)
    lab.name(str(tmp_path / "a" / "m"))
    with pytest.raises(ConfigError, match="both called 'm'"):
        lab.name(str(tmp_path / "b" / "m"))


def test_repeats_end_where_a_point_takes_long():
    assert list(Lab(replace(TINY, repeats=3)).repeats()) == [0, 1, 2]
    assert list(Lab(replace(TINY, repeats=3, repeat_limit_s=1e-9)).repeats()) == [0]


def test_prompts_are_the_same_under_every_strategy_and_fraction(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "kvatlas.experiments.accuracy_budget.ask", lambda engine, conversations, strategy: asked.append(conversations)
    )
    monkeypatch.setattr("kvatlas.experiments.accuracy_budget.Lab.engine", lambda *arguments: None)
    samples_of("accuracy_budget", replace(TINY, accuracy_budgets=(0.5, 0.2)))
    assert len(asked) == 1 + 2 * 2
    assert all(one == asked[0] for one in asked)


def test_turns_are_equal_parts_and_the_last_one_asks():
    prompt = RecallPrompt(prompt=tuple(range(100)), answer=(1,), fact_position=0, text_question="?")
    assert in_turns(prompt, 1).turns == (prompt.prompt,)
    parts = in_turns(prompt, 3).turns
    assert [len(part) for part in parts] == [33, 34, 33]
    assert sum(parts, ()) == prompt.prompt
    with pytest.raises(ConfigError, match="too few for 7 turns"):
        in_turns(prompt, 7)


def test_a_fact_told_in_the_first_turn_is_known_in_the_last():
    settings = replace(TINY, strategies=("full",), context_tokens=(256,), turns=(3,), num_prompts=12)
    ((point, samples),) = samples_of("early_fact", settings)
    right = by_metric(samples)["correct"]
    assert len(right) == 12 and sum(right) >= 10
    assert point.params["turns"] == 3


def test_context_and_facts_that_do_not_fit_are_one_line():
    with pytest.raises(ConfigError, match="too short"):
        samples_of("early_fact", replace(TINY, context_tokens=(8,), turns=(1,)))
    with pytest.raises(ConfigError, match="no tokenizer"):
        samples_of("early_fact", replace(TINY, quality_model="random:llama-mini"))
