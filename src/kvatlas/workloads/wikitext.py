"""WikiText (arXiv:1609.07843): articles of Wikipedia as plain lines, or as parquet with a column of text.

In the text form (``wiki.test.tokens``, ``wiki.test.raw``) an article begins with a line `` = Title = `` between blank
lines; a section has more signs, `` = = Section = = ``. In parquet, ``text`` holds one such line per row; rows that
hold several lines, and those of a column ``page``, are articles of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.workloads.rows import is_parquet, parquet_columns, read_parquet_rows, read_text_lines

_TITLE = re.compile(r"\s*= ([^=\s](?:.*[^=\s])?) =\s*")
_COLUMNS = ("page", "text")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One article.

    Args:
        title: its heading, or "" where the text has none.
        text: all of it, the heading included, with its line breaks.
    """

    title: str
    text: str


def read_wikitext(path: str | Path) -> Iterator[Document]:
    """Yield the articles of a file, one after the other.

    Raises:
        TraceError: the file cannot be read, or holds no text.
    """
    path = Path(path)
    empty = True
    for document in _articles(_parquet_texts(path) if is_parquet(path) else read_text_lines(path)):
        empty = False
        yield document
    if empty:
        raise TraceError(f"{path} holds no text; want lines of WikiText, or parquet with a column of text")


def prompts_of_length(
    documents: Iterable[Document], encode: Callable[[str], Sequence[int]], *, num_tokens: int, count: int = 1
) -> list[list[int]]:
    """Return ``count`` prompts of exactly ``num_tokens`` tokens, cut from the articles one after the other.

    Articles follow each other without a separator, and are read only as far as needed; no token is used twice.

    Args:
        documents: the articles.
        encode: text to token ids, without special tokens.
        num_tokens: length of each prompt, at least 1.
        count: number of prompts, at least 1.

    Raises:
        ConfigError: a number is below 1, or the articles are too short for so much.
    """
    if num_tokens < 1 or count < 1:
        raise ConfigError(f"num_tokens and count are {num_tokens} and {count}; want at least 1 each")
    tokens: list[int] = []
    for document in documents:
        tokens += encode(document.text)
        if len(tokens) >= num_tokens * count:
            return [tokens[at : at + num_tokens] for at in range(0, num_tokens * count, num_tokens)]
    raise ConfigError(
        f"the text has {len(tokens)} tokens, {count} x {num_tokens} are wanted; take a longer file, such as the "
        "training part of WikiText-103 with 103 million words"
    )


def _articles(lines: Iterable[str]) -> Iterator[Document]:
    """Yield the articles of lines; a line that itself holds several is an article."""
    title, held, blank = "", list[str](), True
    for line in lines:
        whole = "\n" in line.strip("\n")
        heading = _TITLE.fullmatch(line.split("\n", 1)[0] if whole else line) if blank or whole else None
        if whole or heading:
            if any(map(str.strip, held)):
                yield Document(title=title, text="\n".join(held))
            title, held = heading[1] if heading else "", []
        if whole:
            yield Document(title=title, text=line)
            title = ""
        else:
            held.append(line.removesuffix("\n"))
        blank = whole or not line.strip()
    if any(map(str.strip, held)):
        yield Document(title=title, text="\n".join(held))


def _parquet_texts(path: Path) -> Iterator[str]:
    there = parquet_columns(path)
    column = next((name for name in _COLUMNS if name in there), None)
    if column is None:
        raise TraceError(f"{path} has no column 'text' or 'page'; it has {', '.join(there)}")
    for place, row in read_parquet_rows(path, [column]):
        if not isinstance(row[column], str):
            raise place.error(row[column], f"{column} as a text")
        yield row[column]
