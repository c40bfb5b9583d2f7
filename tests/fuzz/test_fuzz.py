"""Half a minute of fuzzing in the fast tests, and all of it under the mark ``slow``: nothing raw, hung or harmed.

``KVATLAS_FUZZ_SEED`` and ``KVATLAS_FUZZ_CASES`` choose others; a finding tells the command that brings it back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.fuzz.harness import GOOD, Tally, Verdict, run_target
from tests.fuzz.targets import TARGETS, own_surroundings
from tests.fuzz.workplace import Workplace

SEED = int(os.environ.get("KVATLAS_FUZZ_SEED", "1"))
CASES = int(os.environ.get("KVATLAS_FUZZ_CASES", "0"))
FULL = 500

# Cases that take about three seconds on one core.
_QUICK = {
    "params": 60,
    "prompts": 75,
    "strategies": 75,
    "studies": 30,
    "traces": 125,
    "checkpoints": 20,
    "commands": 25,
    "company": 12,
    "processes": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("fuzz")
    with own_surroundings(folder):
        yield Workplace(folder / "workplace")


def judge_all(name: str, cases: int, place: Workplace) -> Tally:
    tally = run_target(TARGETS[name], place, SEED, range(cases))
    assert not tally.findings, "\n".join(map(str, tally.findings[:10]))
    assert sum(tally.counts[verdict] for verdict in GOOD) == cases
    return tally


_SLOW = {"processes"}  # each case is a process of its own


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in TARGETS]
)
def test_half_a_minute_of_odd_inputs(name: str, place: Workplace) -> None:
    judge_all(name, CASES or _QUICK[name], place)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TARGETS)
def test_odd_inputs(name: str, place: Workplace) -> None:
    target = TARGETS[name]
    cases = round((CASES or FULL) * target.share)
    tally = judge_all(name, cases, place)
    for verdict in (Verdict.ACCEPTED, Verdict.REFUSED):
        assert tally.counts[verdict] >= target.least * cases, f"few are {verdict}: {tally.counts}; little is fuzzed"
