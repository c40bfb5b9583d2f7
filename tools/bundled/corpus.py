"""Training and held-out text for the bundled model: docstrings of permissively licensed Python code.

Docstrings are read from the running interpreter and environment, so nothing is downloaded. Whole top-level
standard-library modules are held out, to keep related docstrings from standing on both sides.
"""

import ast
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvatlas.workloads.recall import NAMES

PACKAGES = ("numpy", "networkx")
LICENCES = {"Python standard library": "PSF-2.0", "numpy": "BSD-3-Clause", "networkx": "BSD-3-Clause"}
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
MIN_DOCSTRING_CHARS = 80
HELD_OUT_ONE_IN = 6
MAX_FILLER_CHARS = 220_000
NAME_PATTERN = re.compile(r"\b(" + "|".join(NAMES) + r")\b")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text by use; no docstring stands in both.

    Args:
        train: text for tokenizer and model.
        held_out: filler for evaluation; mentions none of the recall names.
    """

    train: str
    held_out: str


def read_corpus() -> Corpus:
    """Return the docstrings of the standard library and of ``PACKAGES``, split into train and held-out."""
    train: dict[str, None] = {}
    held_out: dict[str, None] = {}
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for module, text in _docstrings(stdlib):
        (held_out if zlib.crc32(module.encode()) % HELD_OUT_ONE_IN == 0 else train)[text] = None
    for package in PACKAGES:
        for _, text in _docstrings(Path(sysconfig.get_paths()["purelib"]) / package):
            train[text] = None
    filler = [text for text in held_out if text not in train and not NAME_PATTERN.search(text)]
    return Corpus(train="\n\n".join(train), held_out=_whole_texts("\n\n".join(filler), MAX_FILLER_CHARS))


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (top-level module, docstring) for all code under ``root``, in path order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        module = relative.parts[0].removesuffix(".py")
        for text in _docstrings_of_file(path):
            if len(text) >= MIN_DOCSTRING_CHARS and text.isascii():
                yield module, text


def _docstrings_of_file(path: Path) -> Iterator[str]:
    """Yield the docstrings of one file; none if it is not valid Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _whole_texts(text: str, max_chars: int) -> str:
    """Return ``text`` cut at a paragraph boundary, at most ``max_chars`` long."""
    if len(text) <= max_chars:
        return text
    return text[: text.rindex("\n\n", 0, max_chars)]
