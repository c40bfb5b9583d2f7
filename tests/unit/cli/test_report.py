import pytest
from tests.unit.reports.made_up import study_file

from kvatlas.cli.report import report
from kvatlas.reports import page


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(page, "write_report", lambda records, out: out / "index.html")  # drawing takes seconds
    report(study_file(tmp_path / "records.duckdb"), tmp_path / "page")
    return capsys.readouterr().out


def test_the_summary_is_a_line_per_criterion(printed):
    assert len(printed.splitlines()) < 70
    assert "prompt_length on llama-160m-shape" in printed
    assert "full, 4 of 4" in printed
    assert printed.rstrip().endswith("index.html")


def test_the_summary_says_what_is_emulated_and_how_the_study_fared(printed):
    headings = [line for line in printed.splitlines() if "output_length on" in line]
    assert ["emulated link 16GB/s,10us" in line for line in headings] == [False, True]
    assert "The study's findings:" in printed and "on an emulated link" in printed
