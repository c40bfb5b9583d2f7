"""The harness finds what it is there to find: planted failures, one of each kind, and cases that try nothing."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from tests.fuzz.commands import judge_output
from tests.fuzz.guests import InjectedError
from tests.fuzz.harness import LONGEST_LINE, Case, Harm, RefusedError, Target, Verdict, judge, run_target
from tests.fuzz.run import table
from tests.fuzz.values import ALL, odd, value
from tests.fuzz.workplace import Workplace

from kvatlas.core.errors import ConfigError, KvatlasError
from kvatlas.engine.params import SamplingParams


def raising(error: BaseException) -> Callable[[], object]:
    def run() -> object:
        raise error

    return run


def judged(run: Callable[[], object], limit_s: float = 5.0) -> tuple[Verdict, str]:
    return judge(Case(told="planted", run=run, limit_s=limit_s))


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ConfigError("temperature must be at least 0, got -1; write 0 for greedy"), Verdict.REFUSED),
        (KvatlasError("no"), Verdict.REFUSED),
        (RefusedError("error: no"), Verdict.REFUSED),
        (ValueError("no"), Verdict.RAW),
        (SystemExit(2), Verdict.RAW),
        (MemoryError(), Verdict.RAW),
        (InjectedError("no"), Verdict.RAW),
        (ConfigError(""), Verdict.UNTIDY),
        (RefusedError("two\nlines"), Verdict.UNTIDY),
        (RefusedError("a" * (LONGEST_LINE + 1)), Verdict.UNTIDY),
        (RefusedError("a surrogate \ud800"), Verdict.UNTIDY),
        (Harm("somebody else"), Verdict.HARM),
    ],
)
def test_what_a_case_raises_decides(error: BaseException, verdict: Verdict) -> None:
    found, detail = judged(raising(error))
    assert found is verdict
    assert "test_harness.py" in detail or verdict is not Verdict.RAW


def test_a_case_that_returns_is_accepted() -> None:
    assert judged(lambda: None) == (Verdict.ACCEPTED, "")


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def swallowing() -> None:
    try:
        busy(5)
    except Exception:
        busy(5)


@pytest.mark.parametrize("run", [lambda: busy(5), swallowing, lambda: time.sleep(8)])
def test_a_hang_is_caught_whether_it_computes_or_waits(run: Callable[[], object]) -> None:
    start = time.monotonic()
    verdict, detail = judged(run, limit_s=0.4)
    assert verdict is Verdict.HANG
    assert time.monotonic() - start < 4.5
    assert "test_harness.py" in detail


@pytest.mark.parametrize(
    "run", [lambda: builtins.input("really?"), lambda: sys.stdin.readline(), lambda: sys.stdin.read()]
)
def test_nobody_may_ask(run: Callable[[], object]) -> None:
    assert judged(run)[0] is Verdict.RAW


@pytest.mark.parametrize(
    ("status", "err", "verdict"),
    [
        (0, "", Verdict.ACCEPTED),
        (2, "error: no such model\n", Verdict.REFUSED),
        (2, "", Verdict.RAW),
        (2, "error: a\n" * 9, Verdict.RAW),
        (2, "error: " + "a" * 2000, Verdict.RAW),
        (1, "Traceback (most recent call last):\nerror: a\n", Verdict.RAW),
        (-11, "", Verdict.RAW),
        (None, "", Verdict.RAW),
    ],
)
def test_a_command_is_judged_by_its_status_and_error_line(status: object, err: str, verdict: Verdict) -> None:
    assert judged(lambda: judge_output(status, err))[0] is verdict


def test_a_request_left_behind_and_another_answer_are_harm(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.check("bare")
    request = place.llm("bare").engine.add_request([3, 5])
    assert judged(lambda: place.check("bare"))[0] is Verdict.HARM
    place.llm("bare").engine.cancel(request)
    place.check("bare")
    weight = place.model.model.embed_tokens.weight
    weight.data.neg_()
    assert judged(lambda: place.check("bare"))[0] is Verdict.HARM


class Nowhere:
    def renew(self) -> None: ...


def test_a_finding_tells_how_to_see_it_again() -> None:
    def make(rng: Random, _: object) -> Case:
        number = rng.randrange(10)
        return Case(told=f"f({number})", run=raising(ValueError(str(number))) if number == 3 else lambda: None)

    target = Target(name="planted", make=make)
    told: list[object] = []
    tally = run_target(target, Nowhere(), 7, range(60), told.append)
    assert tally.counts[Verdict.RAW] == len(tally.findings) == len(told) > 0
    assert tally.cases == 60
    for finding in tally.findings:
        again = run_target(target, Nowhere(), 7, [finding.number])
        assert again.findings == [finding]
        assert f"--target planted --seed 7 --only {finding.number}" in str(finding)
    assert table([tally], 7).splitlines()[-1].split()[1:3] == ["60", str(tally.counts[Verdict.ACCEPTED])]


def test_values_are_made_anew_from_their_source() -> None:
    for source in (source for kind in ALL for source in kind):
        value(source)
    assert value("[3]") is not value("[3]")
    assert value("SamplingParams()") == SamplingParams()
    assert odd(Random(1)) == odd(Random(1))
