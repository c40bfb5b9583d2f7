"""``python -m tests.fuzz.run --cases 500 --seed 1``: judge cases of all targets; print findings and counts."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.harness import Tally, Verdict, run_target
from tests.fuzz.targets import TARGETS, own_surroundings
from tests.fuzz.workplace import Workplace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=500, help="of each target; twice as many of company, a tenth of processes"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated; default: all")
    parser.add_argument("--only", type=int, help="one case, by its number; its input is printed")
    given = parser.parse_args(arguments)
    faulthandler.enable()
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory() as folder, own_surroundings(Path(folder)):
        place = Workplace(Path(folder) / "workplace")
        for name in given.target or TARGETS:
            target = TARGETS[name]
            numbers = range(round(given.cases * target.share)) if given.only is None else [given.only]
            tallies.append(run_target(target, place, given.seed, numbers, lambda found: print(found, flush=True)))
    print(table(tallies, given.seed))
    return int(any(tally.findings for tally in tallies))


def table(tallies: Sequence[Tally], seed: int) -> str:
    """Return the counts as a table, with their sum."""
    verdicts = list(Verdict)
    rows = [["target", "cases", *verdicts, "s"]]
    rows += [
        [tally.target, str(tally.cases), *(str(tally.counts[one]) for one in verdicts), f"{tally.seconds:.0f}"]
        for tally in tallies
    ]
    sums = [str(sum(tally.counts[one] for tally in tallies)) for one in verdicts]
    cases, seconds = sum(tally.cases for tally in tallies), sum(tally.seconds for tally in tallies)
    rows.append(["all", str(cases), *sums, f"{seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"seed {seed}", *lines])


if __name__ == "__main__":
    sys.exit(main())
