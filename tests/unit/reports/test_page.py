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
from kvatlas.reports.page import write_report

FIGURES = {
    "ttft_by_prompt_length",
    "kv_memory_by_prompt_length",
    "throughput_by_concurrency",
    "kv_memory_by_concurrency",
    "throughput_per_gb_by_concurrency",
    "early_fact_retention",
    "early_fact_difference",
    "trace_latency",
    "trace_totals",
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
    sections = {"winners", "prompt_length", "concurrency", "early_fact", "trace_replay", "study", "missing", "runs"}
    assert set(page.ids) >= sections
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
        "That is vLLM's policy, not vLLM",
        f"SLO: {SLO}",
        "group 32 > block size 16; raise block_size",
        "CapacityError: 8,192 tokens <need> 3 GiB",
        "Peak memory outside the pool in prompt_length: 96 numbers are estimated",
        "the paper itself was not seen, so the study's numbers are second-hand",
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
    assert svg.count("<path") > 50


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
