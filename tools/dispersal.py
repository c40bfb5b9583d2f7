"""Look for what strategies are called where nobody should know them, so that a strategy stays in one file.

Two rules, over the syntax trees of ``src/kvatlas``:

- In engine, storage, kernels and models, no identifier and no string holds the name of a stage that says what is kept,
  how a budget is divided or what is read, nor that of its class, as a whole word: ``quest_pages`` and ``SnapKVCache``
  do, ``request`` does not. Docstrings and comments are prose and may.
- Outside strategies, nothing is imported from the file of a stage, and no class of one is asked for by ``isinstance``,
  ``issubclass`` or a pattern; the bases of the axes may be.

``full`` is excused from the first rule: it names having no strategy, is the default of every request, and is a common
word besides. What breaks the rules today is listed in ``ALLOWED``; what is listed and no longer found is an error too.

python tools/dispersal.py    # exit with status 1 and a line for each finding
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvatlas.core.vocabulary import Axis
from kvatlas.strategies.registry import stages
from kvatlas.strategies.stage import Attend, Budget, Encode, Keep, Place, Stage

SOURCE = Path(__file__).parents[1] / "src" / "kvatlas"
ALLOWED: dict[tuple[str, str], str] = {}
"""Why a name may stand in a file, by both: a path below ``src/kvatlas`` and a word or class as findings tell it."""

_NAMELESS = ("engine", "storage", "kernels", "models")
_NAMED_AXES = ("keep", "budget", "attend")
_EXCUSED = "full"
_BASES = (Stage, Keep, Budget, Encode, Place, Attend)
_STRATEGIES = "kvatlas.strategies"
_BOUNDARY = re.compile(r"_+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])")


@dataclass(frozen=True, order=True)
class Finding:
    """A name where it may not stand.

    Args:
        file: path below ``src/kvatlas``.
        line: counted from 1.
        name: of a stage or of its class.
        what: the code that holds it.
    """

    file: str
    line: int
    name: str
    what: str

    def __str__(self) -> str:
        return f"src/kvatlas/{self.file}:{self.line}: {self.name!r} in {self.what}"


def main(source: Path = SOURCE, allowed: Collection[tuple[str, str]] = tuple(ALLOWED)) -> int:
    """Print what breaks the rules and is not allowed, and what is allowed for nothing; return the exit status."""
    findings = sorted(find(source))
    found = {(finding.file, finding.name) for finding in findings}
    errors = [
        f"{finding}; let the stage say it and the plan carry it"
        for finding in findings
        if (finding.file, finding.name) not in allowed
    ]
    errors += [
        f"src/kvatlas/{file}: {name!r} is no longer there; take it out of ALLOWED in tools/dispersal.py"
        for file, name in sorted(set(allowed) - found)
    ]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return int(bool(errors))


def find(source: Path) -> Iterator[Finding]:
    """Yield every finding below ``source``, a folder like ``src/kvatlas``."""
    names, classes = stage_names(), stage_classes()
    for path in sorted(source.rglob("*.py")):
        file = path.relative_to(source).as_posix()
        package = file.split("/")[0]
        if package == "strategies":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if package in _NAMELESS:
            yield from _names_in(tree, file, names)
        yield from _classes_in(tree, file, classes)


def stage_names() -> dict[tuple[str, ...], str]:
    """Return the names that the first rule is about, by their words: of our stages and of their classes."""
    ours = [
        (name, stage)
        for name, stage in stages().items()
        if stage.axis.value in _NAMED_AXES and stage.__module__.startswith(f"{_STRATEGIES}.") and name != _EXCUSED
    ]
    return {words(text): name for name, stage in ours for text in (name, stage.__name__)}


def stage_classes() -> set[str]:
    """Return the names of our classes of single stages, on every axis."""
    stages()
    classes, waiting = set(), [Stage]
    while waiting:
        stage = waiting.pop()
        waiting += stage.__subclasses__()
        if stage not in _BASES and stage.__module__.startswith(f"{_STRATEGIES}."):
            classes.add(stage.__name__)
    return classes


def words(identifier: str) -> tuple[str, ...]:
    """Return the words of a name in snake or camel case, in small letters."""
    return tuple(word.lower() for word in _BOUNDARY.split(identifier) if word)


def _names_in(tree: ast.Module, file: str, names: dict[tuple[str, ...], str]) -> Iterator[Finding]:
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            texts, what = re.findall(r"\w+", node.value), f"the string {node.value[:60]!r}"
        else:
            texts = list(_identifiers(node))
            what = " and ".join(texts)
        for text in texts:
            for name in _held(words(text), names):
                yield Finding(file, getattr(node, "lineno", 1), name, what)


def _identifiers(node: ast.AST) -> Iterator[str]:
    """Yield what a node calls something."""
    for field in ("id", "attr", "name", "arg", "asname", "module", "rest"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield from value.split(".")
    if isinstance(node, ast.Global | ast.Nonlocal):
        yield from node.names
    if isinstance(node, ast.MatchClass):
        yield from node.kwd_attrs


def _held(parts: tuple[str, ...], names: dict[tuple[str, ...], str]) -> Iterator[str]:
    for wanted, name in names.items():
        if any(parts[at : at + len(wanted)] == wanted for at in range(len(parts) - len(wanted) + 1)):
            yield name


def _classes_in(tree: ast.Module, file: str, classes: set[str]) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            whence = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            for alias in node.names:
                path = f"{whence}{alias.name}".split(".")
                if _of_one_stage(path) or ("strategies" in path and path[-1] in classes):
                    yield Finding(file, node.lineno, path[-1], ast.unparse(node))
        elif isinstance(node, ast.MatchClass):
            yield from _asked(node.cls, node, file, classes)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            for kinds in node.args[1:]:
                yield from _asked(kinds, node, file, classes)


def _of_one_stage(path: list[str]) -> bool:
    """Return whether what is imported lies in the file of a stage."""
    return any(path[at] == "strategies" and path[at + 1] in set(Axis) for at in range(len(path) - 1))


def _asked(kinds: ast.expr, where: ast.expr | ast.pattern, file: str, classes: set[str]) -> Iterator[Finding]:
    named = {name for part in ast.walk(kinds) for name in _identifiers(part)}
    for name in sorted(named & classes):
        yield Finding(file, where.lineno, name, ast.unparse(where))


if __name__ == "__main__":
    sys.exit(main())
