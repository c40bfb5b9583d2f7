"""Settings, and the file that holds them."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, strategies as st
from tests.unit.cli.running import kvatlas

from kvatlas.core.errors import ConfigError
from kvatlas.core.units import parse_tier_bytes
from kvatlas.experiments.presets import PRESETS
from kvatlas.experiments.settings import Settings, link_name, time_limit
from kvatlas.experiments.study import dump_study, parse_study

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
WHOLE = st.integers(1, 10**7)
ABOVE_0 = st.floats(min_value=1e-300, max_value=1e300)
SETTINGS = st.builds(
    Settings,
    strategies=st.lists(
        st.sampled_from(["full", "h2o(heavy=0.1, recent=0.3)", "infinigen"]), min_size=1, max_size=3
    ).map(tuple),
    quality_model=st.none() | TEXTS.filter(bool),
    speed_model=TEXTS,
    prompt_model=st.none() | TEXTS.filter(bool),
    seed=st.integers(0, 2**63 - 1),
    repeat_limit_s=ABOVE_0 | st.just(math.inf),
    time_limits=st.lists(TEXTS, max_size=2).map(tuple),
    prompt_tokens=st.lists(WHOLE, min_size=1, max_size=3).map(tuple),
    rates=st.lists(ABOVE_0, min_size=1, max_size=3).map(tuple),
    trace_time_scale=st.floats(0, 1e300),
    traces=st.lists(TEXTS, min_size=1, max_size=2).map(tuple),
)


def settings_from(text, preset="quick"):
    return replace(PRESETS[preset], **parse_study(text, "study.toml").changes)


@given(settings=SETTINGS, preset=st.sampled_from(sorted(PRESETS)))
def test_a_dumped_study_reads_back_to_equal_settings(settings, preset):
    assert settings_from(dump_study(settings), preset) == settings


def test_every_preset_reads_back():
    for name, preset in PRESETS.items():
        study = parse_study(dump_study(preset, ["early_fact"], "out/r.duckdb"), "study.toml")
        assert replace(PRESETS["standard" if name == "quick" else "quick"], **study.changes) == preset
        assert (study.experiments, study.records) == (("early_fact",), "out/r.duckdb")
        assert set(study.changes) == {field.name for field in fields(Settings)}


def test_what_a_file_leaves_out_is_the_presets():
    study = parse_study('preset = "standard"\nrates = [1, 2.5]\nquality_model = ""\n', "study.toml")
    assert study.preset == "standard"
    assert study.changes == {"rates": (1.0, 2.5), "quality_model": None}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("promt_tokens = [1]", ["unknown setting in 'study.toml' 'promt_tokens'", "did you mean 'prompt_tokens'"]),
        ("prompt_tokens = 512", ["prompt_tokens=512", "square brackets"]),
        ("prompt_tokens = [1.5]", ["prompt_tokens=1.5", "whole number"]),
        ("repeats = true", ["repeats=True", "whole number"]),
        ("seed = 1.0", ["seed=1.0", "whole number"]),
        ('slo_ttft_s = "fast"', ["slo_ttft_s='fast'", "a number"]),
        ("strategies = [1]", ["strategies=1", "a text in quotes"]),
        ("dtype = 16", ["dtype=16", "a text in quotes"]),
        ("quality_model = 1", ["quality_model=1", "a text in quotes"]),
        ("repeats = \nseed = 1", ["not TOML", "line 1"]),
    ],
)
def test_files_that_cannot_be_used(text, parts):
    with pytest.raises(ConfigError) as caught:
        settings_from(text)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"strategies": ("h3o",)}, ["unknown strategy 'h3o'"]),
        ({"link": "fast"}, ["'fast'", "16GB/s,10us"]),
        ({"breakdown_links": ("none", "4GB")}, ["'4GB'", "16GB/s,10us"]),
        ({"host_memory": "much"}, ["'much'", "512MiB"]),
        ({"output_tokens": (8, 1)}, ["output_tokens=(8, 1)", "at least 2"]),
        ({"turns": (0,)}, ["turns=(0,)", "at least 1"]),
        ({"rates": (math.inf,)}, ["rates=(inf,)", "above 0"]),
        ({"repeat_limit_s": 0.0}, ["repeat_limit_s=0.0", "above 0"]),
        ({"accuracy_budgets": (1.5,)}, ["accuracy_budgets=(1.5,)", "(0, 1]"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"strategies": ()}, ["strategies is empty", "at least one"]),
        ({"prompt_tokens": ()}, ["prompt_tokens is empty"]),
        ({"trace_time_scale": math.nan}, ["trace_time_scale=nan"]),
    ],
)
def test_settings_out_of_range(changes, parts):
    with pytest.raises(ConfigError) as caught:
        Settings(**changes)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_time_limits():
    settings = Settings(time_limits=("early_fact=600", "300", " model_size = 5"))
    assert [time_limit(settings, name) for name in ("early_fact", "model_size", "request_rate")] == [600, 5, 300]
    assert time_limit(Settings(), "early_fact") == math.inf
    for entry in ("soon", "0", "nan", "early_fact=", "=5", "-3"):
        with pytest.raises(ConfigError, match="not understood"):
            time_limit(Settings(time_limits=(entry,)), "early_fact")


def test_links_and_the_host_have_one_spelling():
    assert (link_name("none"), link_name("16GB/s, 10us")) == ("none", "16 GB/s, 10 us")
    assert (parse_tier_bytes("0"), parse_tier_bytes("1KiB")) == (0, 1024)


def test_flags_override_the_file_and_the_file_the_preset(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text('preset = "standard"\nexperiments = ["early_fact"]\nseed = 3\nrepeats = 9\nrecords = "r.duckdb"\n')
    dumped = kvatlas("characterize", "--config", study, "--seed", 4, "--no-time-limit", "--dump-config")
    assert (dumped.status, dumped.err) == (0, "")
    found = parse_study(dumped.out, "-")
    assert (found.experiments, found.records) == (("early_fact",), "r.duckdb")
    expected = replace(PRESETS["standard"], seed=4, repeats=9, time_limits=())
    assert replace(PRESETS["quick"], **found.changes) == expected
    other = kvatlas(
        "characterize", "model_size", "--config", study, "--preset", "quick", "--records", "x", "--dump-config"
    )
    found = parse_study(other.out, "-")
    assert (found.experiments, found.records) == (("model_size",), "x")
    assert replace(PRESETS["full"], **found.changes) == replace(PRESETS["quick"], seed=3, repeats=9)


def test_an_empty_list_in_a_file_is_one_line(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text("breakdown_links = []\n")
    assert "breakdown_links is empty" in kvatlas("characterize", "--config", study).error


def test_a_file_that_is_not_there(tmp_path):
    assert "check the path" in kvatlas("characterize", "--config", tmp_path / "gone.toml").error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "'study.toml' says nothing; write a setting"),
        (b"# a remark\n", "says nothing"),
        (b"\xff\xfeseed", "is not UTF-8 text"),
        (b"x = " + b"[" * 5000, "is not TOML: "),
        (b"seed = " + b"9" * 5000, "is not TOML: "),
        (b"seed = 99999999999999999999", "seed=99999999999999999999 is out of range"),
        (b"seed = nan", "seed=nan in 'study.toml' is of the wrong type"),
        (b"rates = [inf]", "rates=(inf,) is out of range"),
        (b"prompt_tokens = [100000000000]", "at most 10,000,000"),
        (b"output_tokens = [100000000000]", "at most 10,000,000"),
    ],
)
def test_files_that_are_no_study_are_one_line(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_bytes(content)
    assert said in kvatlas("characterize", "--config", "study.toml", "--list").error


def test_a_folder_is_no_study(tmp_path):
    assert "cannot be read (Is a directory)" in kvatlas("characterize", "--config", tmp_path).error


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_marks_of_byte_order_do_not_matter(tmp_path, mark, end):
    (tmp_path / "study.toml").write_bytes(mark + f"seed = 7{end}turns = [2, 3]{end}".encode())
    listed = kvatlas("characterize", "--config", tmp_path / "study.toml", "--list")
    assert "seed = 7\n" in listed.out and "turns = (2, 3)\n" in listed.out


@pytest.mark.parametrize("threads", [0, -1, 10**6, 10**40])
def test_numbers_of_threads_that_no_machine_has(threads):
    assert "threads=" in kvatlas("characterize", "prompt_length", "--threads", threads).error
