"""Strategy sentences: of known and misspelt stages, with values that fit and values that do not, and broken grammar."""

from __future__ import annotations

import dataclasses
from random import Random

from tests.fuzz.harness import Case, Target
from tests.fuzz.values import odd, odd_text, value
from tests.fuzz.workplace import INNOCENT, Workplace, must

from kvatlas.engine.params import SamplingParams
from kvatlas.strategies.recipes import RECIPES
from kvatlas.strategies.registry import stages
from kvatlas.strategies.strategy import Strategy

_VALUES = (
    *("1", "2", "4", "5", "8", "16", "0.1", "0.5", "1.0", "0.9", "0", "-1", "true", "false", "host", "disk", "inf"),
    *("-inf", "nan", "1e-300", "1e300", "1e400", "1e-5", "10000000000", "9" * 40, "9" * 5000, "0x10", "1_000", "+3"),
    *("0-1", "2-", "1-2", "0-", "3-1", "1-2-3", "-2"),
    *("", " ", "٣", "½", "None", "none", "'host'", "HOST", "16GB/s", "a" * 300, "1.5.2", "--", "1j", "1e", ".5", "5."),
)
_WHOLE = ("4", "8", "16", "20", "2", "32")
_NAMES = ("", "h3o", "H2O", "Full", "int4", "infinigenn", "KIVI", "_", "h2o2", "stream_llm", "é", "x" * 2000, "none")
_BETWEEN = ("|", " | ", "||", "| |", ",", ";", " ", "\n|\n", "->", "+", "|\t")


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: a sentence is read, printed, read again, and a few tokens are generated under it."""
    source = odd(rng) if rng.random() < 0.08 else repr(_sentence(rng))

    def run() -> None:
        given = value(source)
        parsed = Strategy.parse(given)
        must(Strategy.parse(str(parsed)) == parsed, f"{parsed} reads back as {Strategy.parse(str(parsed))}")
        must(hash(Strategy.parse(str(parsed))) == hash(parsed), "equal strategies have unequal hashes")
        engine = place.llm("plain").engine
        bound = engine.footprint(parsed, 40, 8)
        must(0 < bound.final_bytes <= bound.peak_bytes + bound.host_bytes, f"{bound}")
        try:
            prompts = [INNOCENT * 7, INNOCENT[:1]]
            place.llm("plain").generate(prompts, SamplingParams(max_tokens=4), strategy=given)
        finally:
            place.check("plain")

    return Case(told=f"Strategy.parse({source})", run=run)


def _sentence(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.05:
        return odd_text(rng)
    parts = [_stage(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4)))]
    text = (" | " if kind < 0.9 else rng.choice(_BETWEEN)).join(parts)
    if rng.random() < 0.1:  # a letter too many, or one too few
        at = rng.randrange(len(text) + 1)
        text = (
            text[:at]
            + rng.choice(("", "(", ")", "=", ",", "|", "\x00", "\ud800", "é", " "))
            + text[at + rng.choice((0, 1)) :]
        )
    return text


def _stage(rng: Random) -> str:
    known = stages()
    name = rng.choice([*known, *known, *RECIPES]) if rng.random() < 0.9 else rng.choice(_NAMES)
    fields = [field.name for field in dataclasses.fields(known[name])] if name in known else ["budget", "recent"]
    if rng.random() < 0.3:
        return name
    arguments = []
    for field in rng.sample(fields, min(len(fields), rng.choice((0, 1, 1, 2, 3)))):
        text = rng.choice(_WHOLE) if rng.random() < 0.55 else rng.choice(_VALUES)
        field = (
            field if rng.random() < 0.95 else rng.choice(("hevy", "", "budget", field.upper(), "a b", "self", "name"))
        )
        arguments.append(text if rng.random() < 0.1 else f"{field}={text}")
    return f"{name}({', '.join(arguments)})"


TARGET = Target(name="strategies", make=make)
