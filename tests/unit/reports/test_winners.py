import pytest
from tests.unit.reports.building import SLO, manifest, point, repeats

from kvatlas.metrics.statistics import Interval
from kvatlas.records.store import RecordStore
from kvatlas.reports.answer import answer, answers
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
    assert (tied.verdict, tied.verdict_text) == ("tie", "tie: full, h2o(heavy=0.1)")
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
