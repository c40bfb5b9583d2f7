"""The arithmetic and the arguments of benchmarks/two_checkouts.py; no engine runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("two_checkouts")


def measured(script, **seconds):
    return script.Measured(model="llama-55m", strategy="full", seconds=seconds)


def test_ratios_are_of_pairs_and_a_disturbed_one_hardly_counts(script):
    old = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    new = [1.1 * each for each in old[:-1]] + [900.0]
    (cell,) = script.summary([measured(script, step={"old": old, "new": new})])["cells"]
    assert cell["ratio"] == pytest.approx(1.1) and (cell["old_s"], cell["pairs"]) == (5.0, 9)
    assert cell["low"] == pytest.approx(1.1) and cell["high"] == pytest.approx(1.1) and cell["level"] > 0.95
    assert script.verdict(cell["low"], cell["high"], cell["level"]) == "slower"


def test_over_all_cells_it_is_the_geometric_mean_of_each_pair(script):
    twice = {"old": [1.0] * 9, "new": [2.0] * 9}
    half = {"old": [2.0] * 9, "new": [1.0] * 8 + [4.0]}
    overall = script.summary([measured(script, a=twice), measured(script, b=half)])["overall"]
    assert (overall["ratio"], overall["low"]) == (pytest.approx(1), pytest.approx(1))
    assert overall["high"] == pytest.approx(1), "one pair of nine is no evidence"


def test_cells_that_were_interrupted_count_as_far_as_they_came(script):
    more, fewer = {"old": [1.0] * 8, "new": [1.0] * 8}, {"old": [1.0] * 7, "new": [2.0] * 7}
    told = script.summary([measured(script, a=more, b=fewer), measured(script)])
    assert [cell["pairs"] for cell in told["cells"]] == [8, 7]
    assert told["overall"]["pairs"] == 7 and told["overall"]["ratio"] == pytest.approx(2**0.5)
    assert script.summary([measured(script)]) == {"cells": [], "overall": None}
    assert script.table_of(told).row_count == 3
    json.dumps(told)


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.9, 0.99, 0.96), "faster"),
        ((0.9, 1.0, 0.96), ""),
        ((1.01, 1.02, 0.96), "slower"),
        ((2.0, 3.0, 0.5), "50% only"),
    ],
)
def test_an_interval_with_one_says_nothing(script, interval, said):
    assert script.verdict(*interval) == said


def test_each_is_first_in_its_turn(script):
    orders = [script.turned(script.SIDES, number) for number in range(4)]
    assert orders == [["old", "new"], ["new", "old"]] * 2


def test_cells_share_what_is_asked(script):
    cells = script.chosen_cells([])
    assert {cell.name for cell in cells} == {cell.name for cell in script.CELLS}
    cases = script.cases_of(cells)
    assert [str(case) for case in cases] == ["1x1024+32", "4x256+24", "16x256+16", "1x7168+24"]
    assert [str(case) for case in script.cases_of(script.chosen_cells(["prefill"]))] == ["1x1024+0", "1x7168+0"]


def test_a_whole_name_is_that_cell_alone(script):
    assert [cell.name for cell in script.chosen_cells(["decode batch 1"])] == ["decode batch 1"]
    assert {cell.name for cell in script.chosen_cells(["7K"])} == {"prefill 7K", "decode batch 1 at 7K"}
    with pytest.raises(SystemExit, match="no cell is called like nothing; there are 'prefill 1K'"):
        script.chosen_cells(["nothing"])


def test_a_prompt_and_a_step_are_read_from_an_answer(script):
    answer = {"prefill_s": 3.0, "step_s": [0.2, 0.1, 0.9]}
    by_name = {cell.name: cell.seconds(answer) for cell in script.CELLS}
    assert by_name["prefill 1K"] == 3.0 and by_name["decode batch 16"] == 0.2


def test_defaults(script):
    options = script.parser().parse_args(["HEAD~1"])
    assert (options.old, options.new, options.pairs, options.models) == ("HEAD~1", ".", 15, list(script.MODELS))


def test_what_is_no_revision_is_named(script):
    with pytest.raises(SystemExit, match="no-such-revision"):
        script.checkout("no-such-revision")
