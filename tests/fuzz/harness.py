"""Judge odd inputs: each is accepted, or refused in one line by an error of kvatlas, and nobody else notices.

A case is made by ``random.Random(f"{seed}:{target}:{number}")`` alone, so that a number and a seed bring it back, and
is told as Python source, so that it can be pasted and cut down by hand.
"""

from __future__ import annotations

import builtins
import logging
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from enum import StrEnum
from io import StringIO
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NoReturn

import kvatlas
from kvatlas.core.errors import KvatlasError

HANG_S = 10.0
"""Wall time after which a case counts as hanging; on a busy machine it gets at least half of that in CPU time."""

_WAITING = 6
"""Times that limit after which whoever used no CPU time hangs too: it waits for something that does not come."""

LONGEST_LINE = 1_000
"""Characters of an error line: values are cut, whatever was given."""

_OURS = str(Path(kvatlas.__file__).parent)


class Verdict(StrEnum):
    """How a case ended."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    RAW = "raw exception"
    UNTIDY = "untidy line"
    HANG = "hang"
    HARM = "harm to others"


GOOD = (Verdict.ACCEPTED, Verdict.REFUSED)


class Harm(BaseException):  # no Exception: nothing under test may swallow it
    """Something that is not part of the case was changed by it."""


class Hang(BaseException):
    """A case takes longer than it may."""


class Raw(BaseException):
    """Something went wrong that a user would have to debug, without an exception at hand."""


class RefusedError(Exception):
    """A command refused its arguments; the text is what it said."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input.

    Args:
        told: it, as Python source or as a command line.
        run: tries it; returns where it was accepted, and raises what it raises.
        limit_s: wall time after which it hangs.
    """

    told: str
    run: Callable[[], object]
    limit_s: float = HANG_S


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of input.

    Args:
        name: what the table calls it.
        make: returns a case from random numbers and the workplace.
        least: fraction of the cases that must be accepted, and that must be refused; else nothing is fuzzed.
        share: cases of it for each case that is asked for of all targets.
    """

    name: str
    make: Callable[[Random, Any], Case]
    least: float = 0.1
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A case that did not end well."""

    target: str
    seed: int
    number: int
    verdict: Verdict
    told: str
    detail: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz.run --target {self.target} --seed {self.seed} --only {self.number}"
        return f"{self.verdict}: {self.detail}\n  input: {_cut(self.told, 600)}\n  again: {again}"


@dataclass(kw_only=True)
class Tally:
    """What became of a target's cases."""

    target: str
    counts: Counter[Verdict] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.counts.values())


def run_target(
    target: Target, workplace: Any, seed: int, numbers: Sequence[int], tell: Callable[[Finding], object] = id
) -> Tally:
    """Judge the cases of these numbers; ``tell`` is called with each finding at once."""
    tally, start = Tally(target=target.name), time.perf_counter()
    for number in numbers:
        with _sealed():
            case = target.make(Random(f"{seed}:{target.name}:{number}"), workplace)
        verdict, detail = judge(case)
        tally.counts[verdict] += 1
        if verdict not in GOOD:
            found = Finding(
                target=target.name, seed=seed, number=number, verdict=verdict, told=case.told, detail=detail
            )
            tally.findings.append(found)
            tell(found)
            workplace.renew()
    tally.seconds = time.perf_counter() - start
    return tally


def judge(case: Case) -> tuple[Verdict, str]:
    """Run a case; return how it ended, and what there is to say of that."""
    with _time_limit(case.limit_s) as struck, _sealed():
        try:
            case.run()
            verdict, detail = Verdict.ACCEPTED, ""
        except (KvatlasError, RefusedError) as error:
            verdict, detail = Verdict.REFUSED, str(error)
            if reason := untidy(detail):
                verdict, detail = Verdict.UNTIDY, f"{type(error).__name__} {reason}: {_cut(detail, 300)}"
        except Harm as harm:
            verdict, detail = Verdict.HARM, str(harm)
        except Hang as hang:
            verdict, detail = Verdict.HANG, str(hang)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            verdict, detail = Verdict.RAW, f"{type(error).__name__}: {_cut(str(error), 300)} ({_where(error)})"
    if struck:
        return Verdict.HANG, f"more than {case.limit_s:g} s of wall time, in {struck[0]}"
    return verdict, detail


def untidy(message: str) -> str | None:
    """Return why a message is no good single line; None if it is one."""
    if not message.strip():
        return "says nothing"
    if len(message.splitlines()) > 1:
        return "has several lines"
    if len(message) > LONGEST_LINE:
        return f"has {len(message)} characters"
    if not message.isprintable():
        return "has characters that cannot be printed"
    return None


@contextmanager
def _time_limit(seconds: float) -> Iterator[list[str]]:
    """Raise `Hang` in the block when its time is over; yields a list that then holds where it was."""
    assert threading.current_thread() is threading.main_thread(), "signals reach the main thread only"
    struck: list[str] = []
    begun, used = time.monotonic(), time.process_time()

    def strike(_: int, frame: FrameType | None) -> None:
        if time.process_time() - used < seconds / 2 and time.monotonic() - begun < _WAITING * seconds:
            return
        struck.append(_place(traceback.extract_stack(frame)))
        raise Hang(f"{seconds:g} s are over")

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield struck
    except Hang:  # it came between the case's end and here
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _NoInput(StringIO):
    """A standard input from which nobody may read."""

    def read(self, *_: object) -> NoReturn:
        raise Raw("the standard input was read")

    readline = read


@contextmanager
def _sealed() -> Iterator[None]:
    """Let a case print to nowhere, warn and log in silence, and ask nobody."""
    stdin, ask = sys.stdin, builtins.input

    def asked(prompt: object = "") -> NoReturn:
        raise Raw(f"the user was asked: {prompt}")

    sys.stdin, builtins.input = _NoInput(), asked  # type: ignore[assignment]
    logging.disable()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdin, builtins.input = stdin, ask
        logging.disable(logging.NOTSET)


def _where(error: BaseException) -> str:
    return _place(traceback.extract_tb(error.__traceback__))


def _place(stack: traceback.StackSummary) -> str:
    """Return the innermost line of kvatlas in a stack, or else the innermost line."""
    frame = next((frame for frame in reversed(stack) if frame.filename.startswith(_OURS)), stack[-1] if stack else None)
    if frame is None:
        return "nowhere"
    return f"{frame.filename.removeprefix(str(Path(_OURS).parent) + '/')}:{frame.lineno}"


def _cut(text: str, length: int) -> str:
    shown = text.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."
