"""The checks that strategies of others are given: they pass what is right and name what is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from tests.retold import H2O

import kvatlas
from kvatlas.strategies.plan import Plan
from kvatlas.testing import check_books, check_full_budget, check_parity, check_retold, run, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("own_stages")

ROUNDED = 3e-2  # the last bit of a sum may round a stored number another way


def slow(*arguments: object):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [
        ("h2o(heavy=15, recent=14)", 1e-4),
        ("streaming_llm(sinks=2, recent=29) | int8 | offload(host)", ROUNDED),
        slow("full", 1e-4),
        slow("snapkv(budget=0.5, window=8)", 1e-4),
        slow("quest(budget=32, dense=1)", 1e-4),
        slow("infinigen", 1e-4),
    ],
)
def test_ours_pass(strategy: str, tolerance: float) -> None:
    check_parity(strategy, tolerance=tolerance)
    check_books(strategy)


@pytest.mark.slow
def test_packed_formats_are_checked_without_chunks() -> None:
    check_parity("h2o(heavy=40, recent=20) | kivi(bits=4, residual=8)", chunks=(), tolerance=ROUNDED)
    check_books("kivi(bits=2, residual=8)")


def test_room_for_all() -> None:
    check_full_budget("h2o(heavy=40, recent=16)")
    with pytest.raises(AssertionError, match=r"with room for all tokens, prompt of 40, .* lacks positions \[0\]"):
        check_full_budget("streaming_llm(sinks=0, recent=50)", output_tokens=20)
    with pytest.raises(AssertionError, match=r"full \| int8 with room .* logits differ by"):
        check_full_budget("full | int8", tolerance=1e-6)


def test_retellings() -> None:
    check_retold("h2o(heavy=4, recent=4)", lambda prompt_tokens: H2O(prompt_tokens, 4, 4))
    with pytest.raises(AssertionError, match=r"recent=4\) beside its re-telling, prompt of 34, output 0: lane 0 lacks"):
        check_retold("h2o(heavy=4, recent=4)", lambda prompt_tokens: H2O(prompt_tokens, 5, 4), prompts=(34,))


def test_kept_positions_are_told() -> None:
    job = run("streaming_llm(sinks=1, recent=4)", prompt_tokens=9, output_tokens=2)
    assert job.kept == [[[0, 6, 7, 8]] * 6, [[0, 7, 8, 9]] * 6]
    assert len(job.logits) == 2 and job.logits[0].shape == (101,)


def test_the_model_and_its_tokens_are_the_same_each_time() -> None:
    assert tiny_model() is tiny_model() and tokens(9, seed=3) == tokens(9, seed=3) != tokens(9, seed=4)


@dataclass(frozen=True, kw_only=True)
class Own(kvatlas.Keep):
    """Base of wrong stages."""

    budget: int = 8

    def limits(self, prompt_tokens: int) -> kvatlas.Limits:
        return kvatlas.Limits.steady(self.budget)


def registered(kind: type[Own]) -> str:
    kvatlas.register("own", summary="wrong")(dataclass(frozen=True, kw_only=True)(kind))
    return "own"


def test_scores_that_depend_on_company_are_found() -> None:
    class ByCompany(Own):
        def scores(self, view):
            scores = view.positions_BHS.float()
            return scores if len(view.seen_B) == 1 else -scores

    with pytest.raises(AssertionError, match=r"own in a batch, prompt of \d+, output \d+: lane 0 lacks"):
        check_parity(registered(ByCompany))


def test_prompts_that_are_cut_by_their_chunks_are_found() -> None:
    """Queries of a prompt see all of it, so cutting between chunks is seen in logits."""

    class Streaming(Own):
        streams: ClassVar[bool] = True

        def scores(self, view):
            return view.positions_BHS.float()

    with pytest.raises(AssertionError, match="in chunks of 29"):
        check_parity(registered(Streaming))


@pytest.mark.parametrize(
    ("promise", "said"),
    [
        ("prefill_peak_bytes", "its prompt"),
        ("steady_bytes", "the cut after its prompt"),
        ("final_bytes", "its output"),
        ("host_bytes", "what it holds on the host"),
    ],
)
def test_more_than_promised_is_found(monkeypatch: pytest.MonkeyPatch, promise: str, said: str) -> None:
    honest = Plan.footprint
    monkeypatch.setattr(
        Plan, "footprint", lambda *args, **named: dataclasses.replace(honest(*args, **named), **{promise: 1})
    )
    with pytest.raises(AssertionError, match=f"a request of 70 tokens exceeds its footprint in {said}"):
        check_books("h2o(heavy=5, recent=5) | offload(host)" if promise == "host_bytes" else "full")


def test_errors_of_a_stage_come_through() -> None:
    class Failing(Own):
        def scores(self, view):
            raise ZeroDivisionError("mine")

    own = registered(Failing)
    for check in (check_parity, check_books, check_full_budget):
        with pytest.raises(ZeroDivisionError, match="mine"):
            check(own)


@pytest.mark.slow
def test_no_test_runner_is_needed() -> None:
    code = "import sys, kvatlas.testing; assert 'pytest' not in sys.modules and 'hypothesis' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
