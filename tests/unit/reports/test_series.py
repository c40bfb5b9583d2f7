import pytest
from tests.unit.reports.building import manifest, point, repeats

from kvatlas.records.schema import Sample
from kvatlas.records.store import RecordStore
from kvatlas.reports.labels import SeriesKey, describe, family, series_keys
from kvatlas.reports.series import Study, studies


@pytest.fixture
def store(tmp_path):
    with RecordStore(tmp_path / "records.duckdb") as store:
        store.begin_run(manifest())
        yield store


def ttft(store, strategy, values, **params):
    store.write_point(point("prompt_length", strategy, **params), repeats("ttft", "s", values))


def test_a_budget_stands_in_for_the_numbers_of_a_sentence():
    assert SeriesKey(name="h2o", budget=0.2).label == "h2o 20 %"
    assert SeriesKey(name="full", budget=1.0).label == "full"
    assert family("h2o(heavy=0.1, recent=0.1) | int4(group=64)") == "h2o | int4"
    keys = series_keys([("h2o(heavy=10)", {"budget": 0.2}, 512), ("h2o(heavy=20)", {"budget": 0.2}, 1024)])
    assert {key.label for key in keys.values()} == {"h2o 20 %"}


def test_two_sentences_at_one_budget_and_place_stay_apart():
    keys = series_keys([("h2o(heavy=10)", {"budget": 0.2}, 512), ("h2o(heavy=20)", {"budget": 0.2}, 512)])
    assert {key.label for key in keys.values()} == {"h2o(heavy=10) 20 %", "h2o(heavy=20) 20 %"}


def test_params_read_as_words():
    assert describe({"kv_memory_bytes": 64 * 1024**2, "requests": 2000}) == "KV memory 64 MiB, requests 2,000"


def test_repeats_become_medians_with_intervals(store):
    ttft(store, "full", [3.0, 1.0, 2.0], prompt_tokens=512)
    ttft(store, "full", [4.0], prompt_tokens=1024)
    (study,) = studies(store.rows())
    (series,) = study.series("ttft")
    assert [(mark.x, mark.interval.estimate, mark.interval.n) for mark in series.marks] == [(512, 2, 3), (1024, 4, 1)]
    assert (series.marks[0].interval.low, series.marks[0].interval.high) == (1, 3)


def test_right_or_wrong_becomes_a_share_and_pairs_by_prompt(store):
    answers = {"full": [1, 1, 1, 0], "h2o(size=51)": [1, 0, 0, 0]}
    for strategy, correct in answers.items():
        budget = 1.0 if strategy == "full" else 0.1
        store.write_point(
            point("early_fact", strategy, "quality", context_tokens=512, budget=budget), repeats("correct", "", correct)
        )
    (study,) = studies(store.rows())
    full, h2o = study.series("correct")
    assert (full.key.label, full.marks[0].interval.estimate, full.unit) == ("full", 0.75, "share")
    assert (h2o.key.label, h2o.marks[0].interval.method) == ("h2o 10 %", "Wilson 95 %")
    assert study.paired("correct", h2o.key, 512).estimate == -0.5


def test_conditions_that_differ_are_not_pooled(store):
    for memory in (1024, 2048):
        ttft(store, "full", [1.0], prompt_tokens=512, kv_memory_bytes=memory)
    found = studies(store.rows())
    assert [study.split for study in found] == [{"kv_memory_bytes": 1024}, {"kv_memory_bytes": 2048}]
    assert found[0].condition(512) == "512 tokens, KV memory 1 KiB"


def test_numbers_of_samples_split_nothing(store):
    for strategy, n in (("full", 3), ("h2o", 4)):
        ttft(store, strategy, [1.0] * n, prompt_tokens=512, n=n)
    assert len(studies(store.rows())) == 1


def test_derived_metrics_combine_equal_repeats_or_one_number_with_all(store):
    samples = [*repeats("output_throughput", "tokens/s", [10, 20]), Sample(metric="kv_peak", unit="bytes", value=1e9)]
    store.write_point(point("concurrency", "full", concurrency=2), samples)
    (study,) = studies(store.rows())
    (series,) = study.series("throughput_per_gb")
    assert (series.marks[0].interval.low, series.marks[0].interval.high, series.unit) == (10, 20, "tokens/s/GB")


def test_the_weakest_provenance_of_a_mark_is_kept(store):
    samples = [
        *repeats("kv_after_prefill", "bytes", [8.0]),
        *repeats("sidecars_after_prefill", "bytes", [1.0], "estimated"),
    ]
    store.write_point(point("prompt_length", "h2o", prompt_tokens=512), samples)
    (study,) = studies(store.rows())
    assert study.series("kv_after_prefill")[0].provenances == {"measured"}
    (series,) = study.series("cache_after_prefill")
    assert (series.provenances, series.marks[0].interval.estimate) == ({"estimated"}, 9)


def test_model_roles_never_share_a_study(store):
    ttft(store, "full", [1.0], prompt_tokens=512)
    quality = point("prompt_length", "full", "quality", prompt_tokens=512)
    store.write_point(quality, repeats("ttft", "s", [2.0]))
    found = studies(store.rows())
    assert [study.model_role for study in found] == ["quality", "speed"]
    rows = tuple(row for study in found for row in study.rows)
    with pytest.raises(AssertionError, match="one model role"):
        Study(experiment="x", model="bundled", model_role="speed", swept=None, split={}, rows=rows)


def test_an_unknown_experiment_is_a_study_per_setting(store):
    for temperature in (1, 2):
        strange = point("novelty", "full", temperature=temperature)
        store.write_point(strange, repeats("surprise", "nats", [1.0]))
    assert [study.condition(0.0) for study in studies(store.rows())] == ["temperature 1", "temperature 2"]
