import pytest
from tests.unit.reports.building import manifest, point, repeats

from kvatlas.records.store import RecordStore
from kvatlas.reports.claims import early_fact_claims
from kvatlas.reports.series import studies


def claims(path, shares, budget=0.3, n=200):
    """Return statement -> outcome for shares[strategy][context] of n prompts."""
    with RecordStore(path) as store:
        store.begin_run(manifest())
        for strategy, by_context in shares.items():
            for context, share in by_context.items():
                kept = 1.0 if strategy == "full" else budget
                where = point("early_fact", strategy, "quality", context_tokens=context, budget=kept)
                right = round(share * n)
                store.write_point(where, repeats("correct", "", [1.0] * right + [0.0] * (n - right)))
        (study,) = studies(store.rows())
        return [claim.outcome for claim in early_fact_claims(study)]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (
            {"full": {1024: 0.95, 4096: 0.95}, "h2o(size=1)": {1024: 0.78, 4096: 0.6}},
            ["reproduced", "reproduced in part", "reproduced", "reproduced"],
        ),
        (
            {"full": {1024: 0.5, 4096: 0.5}, "h2o(size=1)": {1024: 0.2, 4096: 0.5}},
            ["refuted", "refuted", "reproduced in part", "refuted"],
        ),
        (
            {"full": {1024: 0.95, 4096: 0.95}, "h2o(size=1)": {1024: 0.95, 4096: 0.95}},
            ["reproduced", "refuted", "not testable here", "not testable here"],
        ),
        ({"full": {512: 0.95}}, ["not testable here"] * 4),
    ],
)
def test_outcomes_follow_from_intervals(tmp_path, shares, expected):
    found = claims(tmp_path / "records.duckdb", shares)
    assert found == [*expected, "not testable here"]


def test_another_budget_cannot_confirm_a_level(tmp_path):
    shares = {"full": {1024: 0.95}, "h2o(size=1)": {1024: 0.75}}
    assert claims(tmp_path / "records.duckdb", shares, budget=0.1)[1] == "not testable here"
