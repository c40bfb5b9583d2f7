"""Prompt files: what any editor writes is read as it stands; what is no text is named."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tests.unit.cli.running import kvatlas

from kvatlas.cli.texts import read_text
from kvatlas.core.errors import ConfigError

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), min_size=1, max_size=20)


class Stdin:
    """Stands for the standard input of a process."""

    closed = False

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@given(texts, st.sampled_from(ENCODINGS))
def test_a_text_is_read_as_it_stands(tmp_path_factory: pytest.TempPathFactory, text: str, encoding: str) -> None:
    path = tmp_path_factory.mktemp("texts") / "prompt.txt"
    path.write_bytes(text.encode(encoding))
    assert read_text(path) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", Stdin(text.encode(encoding)))
        assert read_text(Path("-")) == text


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\u2028"])
def test_line_ends_are_part_of_the_text(tmp_path: Path, line_end: str) -> None:
    """CRLF became LF on the way, so that the model read another text than the file holds."""
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"a{line_end}b{line_end}".encode())
    assert read_text(path) == f"a{line_end}b{line_end}"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("naïve".encode("latin-1"), "is not UTF-8 text (byte 0xef at 2); convert it first, for instance with iconv"),
        (b"\xff\xfea", "is not UTF-16 text (byte 0x61 at 2); convert it first"),
        (b"\xff\xfe\x00\xd8", "is not UTF-16 text"),
        ("ab".encode("utf-16-le"), "has a NUL character at 1, so it is no text"),
        (b"\x7fELF\x00", "has a NUL character at 4, so it is no text"),
        (b"", "is empty; write at least one character"),
        (b"\xef\xbb\xbf", "is empty; write at least one character"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, named: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    assert f"prompt file {str(path)!r} {named}" in kvatlas("generate", "--prompt-file", path).error
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert f"the standard input {named}" in kvatlas("generate", "--prompt-file", "-").error


@pytest.mark.parametrize("name", ["", "gone.txt", "prompt\0.txt", "\ud800", "a" * 5000])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt file .* cannot be read \(.*\); check the path"):
        read_text(tmp_path / name)


def test_a_file_without_end_is_not_read_for_ever() -> None:
    assert "is larger than 256 MiB" in kvatlas("generate", "--prompt-file", "/dev/zero").error


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "the standard input is closed; give a file" in kvatlas("generate", "--prompt-file", "-").error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("a")
    path.chmod(0)
    assert "Permission denied" in kvatlas("generate", "--prompt-file", path).error


def test_bytes_on_the_command_line_that_are_no_text_are_named() -> None:
    """As Python hands them over: half surrogates for bytes that do not decode."""
    error = kvatlas("generate", os.fsdecode(b"na\xefve"), "--max-tokens", "2").error
    assert "the prompt has '\\udcef' at character 2, half of a surrogate pair" in error
