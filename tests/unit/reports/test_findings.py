import pytest
from tests.unit.reports.book import FULL, H2O, INFINIGEN
from tests.unit.reports.building import manifest, point, repeats

from kvatlas.metrics.statistics import Interval, wilson_interval
from kvatlas.records.store import RecordStore
from kvatlas.reports.findings.cast import kept_fraction
from kvatlas.reports.findings.findings import findings, verdicts_text
from kvatlas.reports.findings.rules import coverage_note, judge_effect, judge_equal, judge_level, together
from kvatlas.reports.studies import read_studies


def interval(low, high, n=6):
    return Interval(low=low, estimate=(low + high) / 2, high=high, n=n)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (interval(0.3, 0.4), "reproduced"),
        (interval(0.7, 0.9), "reproduced in part"),
        (interval(0.9, 1.1), "refuted"),
        (interval(1.5, 2.0), "refuted"),
        (interval(0.4, 1.2), "not testable here"),
        (interval(0.3, 0.4, n=1), "not testable here"),
    ],
)
def test_an_effect_is_judged_by_range_and_direction(found, expected):
    assert judge_effect(found, (0.2, 0.6), 1) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (interval(0.95, 1.1), "reproduced"),
        (interval(1.5, 2), "refuted"),
        (interval(1, 1.5), "not testable here"),
        (interval(1, 1, n=1), "not testable here"),
    ],
)
def test_an_equality_must_hold_for_the_whole_interval(found, expected):
    assert judge_equal(found, (0.8, 1.25)) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([interval(0.75, 0.8, n=400)], "reproduced"),
        ([interval(0.75, 0.8, n=400), interval(0.1, 0.2, n=400)], "reproduced in part"),
        ([interval(0.75, 0.8, n=400), interval(0.7, 0.8, n=400)], "reproduced in part"),
        ([interval(0.1, 0.2, n=400)], "refuted"),
        ([interval(0.1, 0.2, n=400), interval(0.5, 0.76, n=400)], "not testable here"),
        ([interval(0.7, 0.8, n=400)], "not testable here"),
        ([interval(0.75, 0.8, n=99)], "not testable here"),
        ([interval(0.1, 0.2, n=99)], "not testable here"),
        ([], "not testable here"),
    ],
)
def test_a_level_wants_whole_intervals_and_enough_answers(found, expected):
    assert judge_level(found, (0.75, 0.9)) == expected


@pytest.mark.parametrize("band", [(0.89, 1.01), (0.65, 0.83)])
def test_fewer_answers_never_help_a_level(band):
    verdicts = [judge_level([wilson_interval(n, n)], band) for n in (1, 10, 1000)]
    assert verdicts == ["not testable here", "not testable here", "reproduced" if band[1] > 1 else "refuted"]


def test_requests_of_one_run_decide_nothing():
    found = Interval(low=0.95, estimate=1, high=1.1, n=64, level=0.0, of_one_run="requests")
    assert judge_equal(found, (0.8, 1.25)) == "not testable here"
    assert judge_effect(found, (0.9, 1.1), 2) == "not testable here"
    assert coverage_note(found) == "requests of one run depend on each other, so no verdict"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not testable here"], "reproduced in part"),
        (["reproduced", "refuted"], "reproduced in part"),
        (["refuted", "not testable here"], "refuted"),
        (["reproduced in part"], "reproduced in part"),
        (["not testable here"], "not testable here"),
        ([], "not testable here"),
    ],
)
def test_a_finding_is_what_its_statements_are(outcomes, expected):
    assert together(outcomes) == expected


@pytest.mark.parametrize(
    ("name", "kept"),
    [(H2O, 0.3), (INFINIGEN, 0.3), ("h2o(heavy=100, recent=50)", None), ("full", None)],
)
def test_the_kept_fraction_of_a_sentence(name, kept):
    assert kept_fraction(name) == kept


@pytest.fixture
def store(tmp_path):
    with RecordStore(tmp_path / "records.duckdb") as store:
        store.begin_run(manifest())
        yield store


def judged(store, number):
    return findings(read_studies(store), store.points())[number - 1]


def outcomes(store, number):
    return [part.outcome for one in judged(store, number).judged for part in one.parts]


def measured(store, experiment, strategy, metric, unit, value, **params):
    spread = [value * factor for factor in (0.99, 0.995, 1, 1.002, 1.005, 1.01)]
    store.write_point(point(experiment, strategy, **params), repeats(metric, unit, spread))


def test_nothing_measured_nothing_testable(store):
    found = findings([], [])
    assert len(found) == 8
    assert {outcome for one in found for outcome in one.outcomes.values()} == {"not testable here"}
    assert verdicts_text(found) == "8 not testable here"


@pytest.mark.parametrize(
    ("h2o_reach", "full_reach", "expected"),
    [
        (131072, 131072, ["reproduced", "refuted", "not testable here"]),
        (8192, 131072, ["reproduced", "reproduced", "not testable here"]),
        (32768, 131072, ["reproduced", "refuted", "not testable here"]),
        (8192, 8192, ["refuted", "not testable here", "not testable here"]),
    ],
)
def test_the_reach_of_a_prompt_follows_from_what_was_refused(store, h2o_reach, full_reach, expected):
    for strategy, reach in ((FULL, full_reach), (H2O, h2o_reach)):
        for prompt in (8192, 16384, 32768, 65536, 131072):
            if prompt <= reach:
                measured(store, "prompt_length", strategy, "ttft", "s", prompt / 1000, prompt_tokens=prompt)
            else:
                where = point("prompt_length", strategy, prompt_tokens=prompt)
                store.write_point(where, status="refused", reason="needs 9 GiB, the pool has 4 GiB")
    assert outcomes(store, 1) == expected


def test_a_reach_that_nobody_tried_is_not_refuted(store):
    measured(store, "prompt_length", FULL, "ttft", "s", 1, prompt_tokens=65536)
    where = point("prompt_length", FULL, prompt_tokens=262144)
    store.write_point(where, status="refused", reason="needs 9 GiB, the pool has 4 GiB")
    assert outcomes(store, 1)[0] == "not testable here"


@pytest.mark.parametrize(("reach", "expected"), [(131072, "reproduced"), (8192, "refuted")])
def test_what_no_record_can_test_does_not_decide_a_finding(store, reach, expected):
    for strategy in (H2O, INFINIGEN):
        for prompt in (8192, 12288, 131072):
            where = point("prompt_length", strategy, prompt_tokens=prompt)
            if prompt <= reach:
                store.write_point(where, repeats("ttft", "s", [1.0] * 6))
            else:
                store.write_point(where, status="refused", reason="needs 9 GiB, the pool has 4 GiB")
    found = judged(store, 2)
    assert found.outcomes == {"none": expected}
    assert found.judged[0].parts[0].outcome == "not testable here"


def hosts(store, **held):
    for strategy, value in zip((FULL, H2O, INFINIGEN), held.values(), strict=True):
        load = {"concurrency": 8, "prompt_tokens": 512, "output_tokens": 64}
        store.write_point(point("concurrency_memory", strategy, **load), repeats("host_peak", "bytes", [value] * 6))
    return judged(store, 4).judged[0].parts[0]


def test_host_memory_that_the_others_cannot_have_confirms_nothing(store):
    part = hosts(store, full=0.0, h2o=0.0, infinigen=8.0 * 1024**2)
    assert part.outcome == "not testable here"
    assert part.measured == "8 MiB against none (n = 6)"
    assert "leave empty by definition" in part.evidence


def test_host_memory_is_a_ratio_where_others_swap(store):
    assert hosts(store, full=2.0, h2o=0.0, infinigen=8.0).outcome == "reproduced"


@pytest.mark.parametrize(("repeated", "expected"), [(1, "not testable here"), (6, "reproduced")])
def test_the_latency_finding_counts_runs_and_not_requests(store, repeated, expected):
    for strategy, seconds in ((FULL, 1.0), (INFINIGEN, 14.0)):
        values = [seconds * (1 + 0.001 * place) for place in range(8 * repeated)]
        store.write_point(point("request_latency", strategy, concurrency=8), repeats("e2e", "s", values))
    part = judged(store, 6).judged[0].parts[2]
    assert part.outcome == expected
    assert ("one run, no interval" in part.measured) == (repeated == 1)


def test_running_out_of_positions_is_no_memory_limit(store):
    measured(store, "prompt_length", FULL, "ttft", "s", 60, prompt_tokens=131072)
    measured(store, "prompt_length", H2O, "ttft", "s", 1, prompt_tokens=4096)
    where = point("prompt_length", H2O, prompt_tokens=8192)
    store.write_point(where, status="refused", reason="prompt of 8192 tokens exceeds the 4096 positions of the model")
    assert outcomes(store, 1)[1] == "not testable here"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({FULL: 100, H2O: 50, INFINIGEN: 52}, ["reproduced", "reproduced"]),
        ({FULL: 100, H2O: 90, INFINIGEN: 180}, ["reproduced in part", "refuted"]),
        ({FULL: 100, H2O: 120}, ["refuted", "not testable here"]),
    ],
)
def test_ratios_are_judged_at_the_largest_setting_both_have(store, values, expected):
    for strategy, value in values.items():
        for asked in (2, 8):
            load = {"concurrency": asked, "prompt_tokens": 512, "output_tokens": 64}
            held = value * asked if asked == 8 else 1
            measured(store, "concurrency_memory", strategy, "device_peak", "bytes", held, **load)
    assert outcomes(store, 3) == expected
    first = judged(store, 3).judged[0].parts[0]
    assert "8 at once (the study: 96 at once)" in first.evidence
    assert first.measured.startswith(f"{values[H2O] / 100:g}x (")


def test_an_emulated_link_is_judged_and_labelled_apart(store):
    for link, times in (("none", 2), ("16GB/s,10us", 17)):
        measured(store, "output_length", FULL, "decode_time", "s", 1.0, output_tokens=64, prompt_tokens=8, link=link)
        spread = [times * factor for factor in (0.98, 0.99, 1, 1.01, 1.02, 1.03)]
        samples = repeats("decode_time", "s", spread, "measured" if link == "none" else "emulated")
        where = point("output_length", INFINIGEN, output_tokens=64, prompt_tokens=8, link=link)
        store.write_point(where, samples)
    found = judged(store, 7)
    assert found.outcomes == {"none": "reproduced in part", "16GB/s,10us": "reproduced in part"}
    real, slow = found.judged
    assert [part.outcome for part in (real.parts[0], slow.parts[0])] == ["reproduced in part", "reproduced"]
    assert "emulated" in slow.parts[0].measured and "emulated" not in real.parts[0].measured
    assert "on an emulated link" in verdicts_text([found])


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"full": (0.95, 0.95), H2O: (0.75, 0.6)}, ["reproduced", "reproduced in part", "reproduced", "reproduced"]),
        ({"full": (0.5, 0.5), H2O: (0.2, 0.5)}, ["refuted", "refuted", "reproduced in part", "refuted"]),
        (
            {"full": (0.95, 0.95), H2O: (0.95, 0.95)},
            ["reproduced", "refuted", "not testable here", "not testable here"],
        ),
    ],
)
def test_early_facts_follow_from_intervals(store, shares, expected, n=200):
    for strategy, by_context in shares.items():
        for context, share in zip((1024, 4096), by_context, strict=True):
            right = round(share * n)
            kept = 1.0 if strategy == "full" else 0.3
            where = point("early_fact", strategy, "quality", context_tokens=context, budget=kept)
            store.write_point(where, repeats("correct", "", [1.0] * right + [0.0] * (n - right)))
    full, infinigen, h2o, loses, _, widens = outcomes(store, 8)
    assert [full, h2o, loses, widens] == expected
    assert infinigen == "not testable here"


def test_another_budget_cannot_confirm_a_level(store):
    for strategy, kept in (("full", 1.0), (H2O, 0.1)):
        where = point("early_fact", strategy, "quality", context_tokens=1024, budget=kept)
        store.write_point(where, repeats("correct", "", [1.0] * 75 + [0.0] * 25))
    part = judged(store, 8).judged[0].parts[2]
    assert part.outcome == "not testable here"
    assert "nearest budget measured is 10 %" in part.evidence


def test_few_answers_decide_no_published_difference(store, n=20):
    for strategy, kept, wrong in (("full", 1.0, 0), (H2O, 0.1, 12)):
        where = point("accuracy_budget", strategy, "quality", task="16 keys", budget=kept)
        store.write_point(where, repeats("correct", "", [0.0] * wrong + [1.0] * (n - wrong)))
    part = judged(store, 8).judged[0].parts[1]
    assert part.outcome == "not testable here"
    assert "too few samples: 20 answers, 100 wanted" in part.evidence


def test_a_loss_at_a_tenth_is_paired_with_the_full_cache(store, n=200):
    for strategy, kept, wrong in (("full", 1.0, 0), (H2O, 0.1, 40), (INFINIGEN, 0.1, 12), (H2O, 0.5, 0)):
        where = point("accuracy_budget", strategy, "quality", task="16 keys", budget=kept)
        store.write_point(where, repeats("correct", "", [0.0] * wrong + [1.0] * (n - wrong)))
    found = judged(store, 8).judged[0].parts
    assert [part.outcome for part in found] == ["reproduced", "reproduced", "not testable here", "reproduced"]
    assert found[1].measured.startswith("\N{MINUS SIGN}20 points")
