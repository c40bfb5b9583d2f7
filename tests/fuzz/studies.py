"""Studies in TOML: ``kvatlas characterize --config``, from the file to the point where measuring would begin."""

from __future__ import annotations

import dataclasses
from random import Random
from unittest import mock

from tests.fuzz.commands import command_line
from tests.fuzz.harness import Case, Target
from tests.fuzz.values import mutated, odd_text
from tests.fuzz.workplace import Workplace
from tests.unit.experiments.tiny import TINY

from kvatlas.experiments.study import dump_study
from kvatlas.experiments.sweep import EXPERIMENTS

_VALUES = (
    *("0", "1", "-1", "3", "1.5", "0.0", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400", "true", "false", '""', '"a"'),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 30, "1" + "0" * 5000),
    *('"nan"', '"1GiB"', '"100TiB"', '"0"', '"cpu"', '"cuda"', '"bfloat16"', '"none"', '"1B/s"', '"16GB/s,10us"'),
    *(
        "[]",
        "[[]]",
        "[1]",
        "[0]",
        "[1.0]",
        "[true]",
        '[""]',
        '["a"]',
        '["poisson"]',
        '["gamma nan"]',
        '["gamma 1e400"]',
    ),
    *('["azure-conv"]', '["random:llama-mini"]', '["/dev/null"]', '["."]', '["\\u0000"]', '["16 keys"]', '["0 keys"]'),
    *("[1, 'a']", "[nan]", "[0.5, inf]", "{}", "{a = 1}", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0x1F"),
    *('"""\na"""', "'''a'''", '"' + "a" * 100_000 + '"', f"[{'1, ' * 3000}1]", '"\\ud800"', '["full", "full"]'),
    *('["h2o(heavy=0.5) | full"]', '["full"]', '["early_fact=5"]', '["early_fact=nan"]', '["=5"]', '["5"]', '"h2o"'),
    *('["9999 keys"]', '["-3 keys"]', '["1e3 keys"]', '["٣ keys"]', '["single  needle"]', '["gamma -1"]', '["gamma"]'),
)
_KEYS = (
    "promt_tokens",
    "a.b",
    '""',
    '"é"',
    "strategies",
    "preset",
    "experiments",
    "records",
    "Seed",
    "model",
    "x" * 3000,
)
_MODES = (["--dump-config"], ["--list"], [], [])


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: a file that differs from a good one, read by a command."""
    data, mode = _study(rng), rng.choice(_MODES)

    def run() -> None:
        path = place.folder / "study.toml"
        path.write_bytes(data)
        with mock.patch("kvatlas.cli.characterize._run", _measured):
            command_line(["characterize", "--config", str(path), *mode])

    return Case(told=f"characterize --config FILE {' '.join(mode)} with {data!r}", run=run)


def _measured(*_: object) -> object:
    from kvatlas.experiments.sweep import Outcome

    return Outcome(measured=1, resumed=0, refused=0, failed=0)


def _study(rng: Random) -> bytes:
    names = [field.name for field in dataclasses.fields(TINY)]
    chosen = [name for name in EXPERIMENTS if rng.random() < 0.3]
    lines = dump_study(TINY, chosen, None if rng.random() < 0.5 else "out/r.duckdb").splitlines()
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        key = rng.choice(names) if rng.random() < 0.9 else rng.choice(_KEYS)
        lines = [line for line in lines if rng.random() < 0.02 or not line.startswith(f"{key} =")]
        lines.insert(rng.randrange(len(lines) + 1), f"{key} = {_value(rng)}")
    text = rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(lines) + rng.choice(("\n", "", "\n\n", " ", "#"))
    data = text.encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.1:
        return mutated(rng, data)
    if kind < 0.16:
        return text.encode(rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32")), "surrogatepass")
    return b"" if kind < 0.17 else data


def _value(rng: Random) -> str:
    if rng.random() < 0.9:
        return rng.choice(_VALUES)
    return f'"{odd_text(rng)}"'


TARGET = Target(name="studies", make=make)
