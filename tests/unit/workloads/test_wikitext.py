"""WikiText's articles in its text form and as parquet, and prompts of exact length cut from them."""

import duckdb
import pytest

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.workloads.wikitext import Document, prompts_of_length, read_wikitext

# Our own words in the form of wiki.test.tokens.
TEXT = """ 
 = Stone bridge = 
 
 A stone bridge stands in the valley . It is 40 @.@ 5 metres long . 
 
 = = History = = 
 
 It was built by <unk> . 
 = Not a title = 
 
 = Lamp = B = 
 
 A lamp gives light . 
"""  # noqa: W291, W293 - the real files have these spaces


def lines_of(text):
    return [line + "\n" for line in text.split("\n")]


def as_parquet(path, column, texts):
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE t ({column} VARCHAR)")
        connection.executemany("INSERT INTO t VALUES (?)", [[text] for text in texts])
        connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    return path


def test_articles_begin_at_titles_between_blank_lines(tmp_path):
    path = tmp_path / "wiki.test.tokens"
    path.write_text(TEXT, encoding="utf-8")
    bridge, lamp = read_wikitext(path)
    assert (bridge.title, lamp.title) == ("Stone bridge", "Lamp = B")
    assert "= = History = =" in bridge.text
    assert " = Not a title = " in bridge.text  # follows a line of text
    assert lamp.text.strip().endswith("A lamp gives light .")
    assert TEXT.index(bridge.text) < TEXT.index(lamp.text)


def test_parquet_of_lines_gives_the_same(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text(TEXT, encoding="utf-8")
    lines = as_parquet(tmp_path / "lines.parquet", "text", lines_of(TEXT))
    assert [(one.title, one.text.rstrip()) for one in read_wikitext(lines)] == [
        (one.title, one.text.rstrip()) for one in read_wikitext(path)
    ]


@pytest.mark.parametrize("column", ["text", "page"])
def test_parquet_of_whole_articles_gives_each(tmp_path, column):
    texts = ["= One =\n\nText of one.", "No title here.\nMore of it."]
    found = list(read_wikitext(as_parquet(tmp_path / "x.parquet", column, texts)))
    assert found == [Document(title="One", text=texts[0]), Document(title="", text=texts[1])]


def test_a_text_without_titles_is_one_article(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("Plain words.\nAnd more.\n")
    assert list(read_wikitext(path)) == [Document(title="", text="Plain words.\nAnd more.")]


def test_prompts_have_exactly_their_length(tmp_path):
    documents = [Document(title=str(n), text=" ".join(f"{n}.{i}" for i in range(7))) for n in range(5)]
    prompts = prompts_of_length(documents, str.split, num_tokens=10, count=3)
    assert [len(prompt) for prompt in prompts] == [10, 10, 10]
    assert [token for prompt in prompts for token in prompt] == " ".join(one.text for one in documents).split()[:30]


def test_articles_are_read_only_as_far_as_needed():
    def endless():
        while True:
            yield Document(title="", text="a b c")

    assert prompts_of_length(endless(), str.split, num_tokens=4, count=2) == [list("abca"), list("bcab")]


def test_what_is_too_short_or_wrong_is_told(tmp_path):
    with pytest.raises(ConfigError, match="has 2 tokens, 2 x 3 are wanted; take a longer file"):
        prompts_of_length([Document(title="", text="a b")], str.split, num_tokens=3, count=2)
    with pytest.raises(ConfigError, match="0 and 1; want at least 1"):
        prompts_of_length([], str.split, num_tokens=0)
    path = tmp_path / "x.txt"
    path.write_text(" \n\n")
    with pytest.raises(TraceError, match="holds no text"):
        list(read_wikitext(path))
    with pytest.raises(TraceError, match="no column 'text' or 'page'; it has n"):
        list(read_wikitext(as_parquet(tmp_path / "x.parquet", "n", ["a"])))
    with pytest.raises(TraceError, match="row 2: got None, expected text as a text"):
        list(read_wikitext(as_parquet(tmp_path / "y.parquet", "text", ["a", None])))
