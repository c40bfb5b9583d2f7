import pytest
import torch

from kvatlas.bench.machine import limit_forms, limits_of, told_machine, torch_threads
from kvatlas.bench.timing import Timing, take_turns
from kvatlas.core.errors import ConfigError


def test_forms_take_turns_and_another_begins_each_round():
    calls: list[str] = []
    forms = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = take_turns(forms, 3, turn_s=0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(timing.walls_s) == len(timing.cpus_s) == 3 for timing in timings.values())


def test_a_turn_is_filled_with_calls():
    assert len(take_turns({"fast": lambda: None}, 1, turn_s=0.005)["fast"].walls_s) > 10


def test_a_slow_form_has_had_its_turns_after_a_while():
    calls: list[str] = []
    forms = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    assert len(take_turns(forms, 5, turn_s=0, limit_s=0)["a"].walls_s) == 1
    assert calls.count("a") == calls.count("b") == 2


def test_no_forms_are_no_timings():
    assert take_turns({}, 2) == {}


def test_medians_and_quartiles():
    timing = Timing(walls_s=[4.0, 1.0, 2.0, 3.0, 100.0], cpus_s=[1.0, 1.0, 5.0])
    assert (timing.wall_s, timing.cpu_s, timing.spread_s) == (3.0, 1.0, (2.0, 4.0))
    assert Timing(walls_s=[2.0], cpus_s=[1.0]).spread_s == (2.0, 2.0)


def test_limits_are_the_fastest_read_and_the_product():
    limits = limits_of(take_turns(limit_forms(1 << 20), 1, turn_s=0), 1 << 20)
    assert limits.read_bytes_per_s > 0
    assert limits.flop_per_s > 0
    assert limits.told()["read_by"] in ("sum of float32", "sum of int64", "dot of float32")


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="threads=0 is out of range"), torch_threads(0):
        pass


def test_the_machine_is_told_with_commit_versions_and_load():
    told = told_machine("kvatlas bench")
    assert {"commit", "versions", "hardware", "load_average", "command"} <= set(told)
