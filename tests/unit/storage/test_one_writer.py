"""The tables have one writer: whoever else assigns to them would have to keep their invariants as well."""

from __future__ import annotations

import ast
from pathlib import Path

import kvatlas

SOURCES = Path(kvatlas.__file__).parent
TABLES = {"table", "length", "hole", "limit"}
OWNERS = {"store", "_store", "tables"}
IN_PLACE = {"fill_", "zero_", "clamp_", "copy_", "add_", "sub_", "masked_fill_", "scatter_", "index_fill_"}


def of_the_store(node: ast.expr) -> bool:
    """Whether an expression is a table, or a part of one, of something called a store."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if not isinstance(node, ast.Attribute) or node.attr not in TABLES:
        return False
    owner = node.value
    return (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")) in OWNERS


def writes(source: str) -> list[int]:
    """Return the lines that write to a table."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            flat = [part for each in targets for part in (each.elts if isinstance(each, ast.Tuple) else [each])]
            found += [node.lineno for each in flat if of_the_store(each)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE:
            found += [node.lineno for _ in [0] if of_the_store(node.func.value)]
    return found


def test_it_sees_writers() -> None:
    for line in (
        "store.length[3] = 1", "self._store.table[a, b] = c", "x, store.hole[0] = 1, 2", "store.length += 1",
        "store.tables.limit[row] -= 1", "store.length[row].clamp_(max=3)", "self.tables.table = x",
    ):  # fmt: skip
        assert writes(line) == [1], line
    for line in ("x = store.length[3]", "self.length = 3", "slots.table[0] = 1", "store.length[row].clamp(max=3)"):
        assert not writes(line), line


def test_nobody_else_writes() -> None:
    wrong = {
        str(path.relative_to(SOURCES)): lines
        for path in SOURCES.rglob("*.py")
        if path.name != "tables.py" and (lines := writes(path.read_text(encoding="utf-8")))
    }
    assert not wrong
