"""How a published number and a measured interval become a verdict; the same rules for every finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvatlas.metrics.statistics import LEVEL, Interval

Outcome = Literal["reproduced", "reproduced in part", "refuted", "not testable here"]
Kind = Literal["ratio", "points", "share", ""]
Range = tuple[float, float]

# A published ratio was told as "about": half or one and a half times as much is still the same finding.
FACTOR = 1.5
# Ratios that were told as equal, flat or near.
EQUAL = 1.25
# Differences of accuracy, in shares.
TOLERANCE = 0.05
# Fewer answers than this decide nothing about a published share, or a published difference of shares.
LEAST_ANSWERS = 100

RULES = (
    f"An effect (a ratio, a loss): reproduced where our interval reaches the published range, widened by a factor of "
    f"{FACTOR:g} or {TOLERANCE * 100:g} points, and leaves out no effect; reproduced in part where only the direction "
    "agrees; refuted where it contains no effect, or the opposite, and not the range; not testable where it contains "
    "both.",
    f"An equality (flat, similar, near): reproduced where our whole interval lies within a factor of {EQUAL:g} or "
    f"{TOLERANCE * 100:g} points of equal; refuted where all of it lies outside; else not testable.",
    f"A level (a share of right answers): reproduced where every whole interval lies within the published range, "
    f"widened by {TOLERANCE * 100:g} points; in part where some do; refuted where all lie wholly outside; else not "
    f"testable. Levels, and differences against a published number, want at least {LEAST_ANSWERS} answers.",
    "A limit: reproduced where prompts of that length ran; refuted where memory ended them earlier; not testable where "
    "none so long was tried. That memory ends early: refuted where ours ran beyond it.",
    "Requests or steps of one run depend on each other, so a single run decides nothing. Compared at the largest "
    "setting that both have, growth over at most the study's own factor of 6; one sample has no interval and decides "
    "nothing. A finding is reproduced where all its statements are, refuted where at least one is and none holds, and "
    "reproduced in part in between; statements that are not testable keep it from being reproduced in full, but for "
    "those that no record of this engine could ever test.",
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One statement of a finding against one study of the records.

    Args:
        statement: the study's, in one line.
        published: its number in words; "" where the statement has none.
        measured: our number, with interval and n; "" where there is none.
        outcome: by the rules.
        evidence: what the number is of, and where; or why there is none.
        kind: how `published_range` and `interval` are drawn; "" if they are not.
        published_range: ends of the published number, for a figure.
        interval: ours, for a figure.
        emulated: True where ours rests on an emulated link.
        decides: False for what no record of this engine could test: shown, but no part of the finding's verdict.
    """

    statement: str
    published: str
    outcome: Outcome
    measured: str = ""
    evidence: str = ""
    kind: Kind = ""
    published_range: Range | None = None
    interval: Interval | None = None
    emulated: bool = False
    decides: bool = True


def untested(statement: str, published: str, why: str, *, measured: str = "", decides: bool = True) -> Part:
    """Return a statement that these records cannot decide, with our number where there is one."""
    return Part(
        statement=statement,
        published=published,
        outcome="not testable here",
        measured=measured,
        evidence=why,
        decides=decides,
    )


def proves_nothing(found: Interval) -> bool:
    """Whether an interval is no more than one independent sample: one number, or one run."""
    return found.n < 2 or bool(found.of_one_run)


def judge_effect(found: Interval, published: Range, neutral: float) -> Outcome:
    """Return the verdict on an effect.

    Args:
        found: ours.
        published: the published range, widened already.
        neutral: no effect: 1 for a ratio, 0 for a difference.
    """
    if proves_nothing(found):
        return "not testable here"
    reaches = found.low <= published[1] and found.high >= published[0]
    if found.contains(neutral):
        return "not testable here" if reaches else "refuted"
    if reaches:
        return "reproduced"
    same_side = (found.low > neutral) == (sum(published) / 2 > neutral)
    return "reproduced in part" if same_side else "refuted"


def judge_equal(found: Interval, equal: Range) -> Outcome:
    """Return the verdict on an equality: inside, outside, or across the border."""
    if proves_nothing(found):
        return "not testable here"
    if equal[0] <= found.low and found.high <= equal[1]:
        return "reproduced"
    return "refuted" if found.high < equal[0] or found.low > equal[1] else "not testable here"


def judge_level(found: Sequence[Interval], published: Range) -> Outcome:
    """Return the verdict on a share that holds at several settings.

    An interval must lie within, or without, as a whole: to ask that it touches the range would reward few samples.

    Args:
        found: ours, one per setting.
        published: the published range, widened already.
    """
    enough = [one for one in found if one.n >= LEAST_ANSWERS]
    held = [one for one in enough if published[0] <= one.low and one.high <= published[1]]
    missed = [one for one in enough if one.high < published[0] or one.low > published[1]]
    if found and len(held) == len(found):
        return "reproduced"
    if found and len(missed) == len(found):
        return "refuted"
    return "reproduced in part" if held else "not testable here"


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the verdict on a finding from those on its statements."""
    tested = [one for one in outcomes if one != "not testable here"]
    if not tested:
        return "not testable here"
    if len(tested) == len(outcomes) and set(tested) == {"reproduced"}:
        return "reproduced"
    return "refuted" if set(tested) == {"refuted"} else "reproduced in part"


def widened(low: float, high: float) -> Range:
    """Return a published ratio with its tolerance."""
    return low / FACTOR, high * FACTOR


def coverage_note(found: Interval) -> str:
    """Return what the reader must know where an interval covers less than 95 %, or claims nothing."""
    if found.of_one_run:
        return f"{found.of_one_run} of one run depend on each other, so no verdict"
    return "" if found.level >= LEVEL else f"coverage {found.level:.0%}, so a hint"
