"""The names of stages outside the folder of strategies: what is found, what is not, and that a list of them shrinks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.dispersal import ALLOWED, find, main, words


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree like ``src/kvatlas`` in which nothing is wrong."""
    plant(
        tmp_path,
        "engine/steps.py",
        '"""As snapkv does."""\n\n\ndef request(full: str = "full") -> None:\n    """Quest."""\n',
    )
    plant(tmp_path, "strategies/keep/own.py", "from kvatlas.strategies.keep.h2o import H2O\n\nsnapkv = H2O\n")
    return tmp_path


def plant(source: Path, file: str, code: str) -> None:
    (source / file).parent.mkdir(parents=True, exist_ok=True)
    (source / file).write_text(code)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("quest_pages = 3", "quest"),
        ("self.last_quest.x = 3", "quest"),
        ("def cut_snapkv(): pass", "snapkv"),
        ("class SnapKVCache: pass", "snapkv"),
        ("class FastH2OCut: pass", "h2o"),
        ("def cut(streaming_llm): pass", "streaming_llm"),
        ("cut(for_streaming_llm=1)", "streaming_llm"),
        ("import cuts as knorm", "knorm"),
        ("from cuts.tova import cut", "tova"),
        ("kind = 'pyramid'", "pyramid"),
        ("raise ValueError(f'{x} wants ada(floor=0.2)')", "ada"),
        ("def cut():\n    'Docstring.'\n    return 'quest'", "quest"),
    ],
)
@pytest.mark.parametrize("package", ["engine", "storage", "kernels", "models"])
def test_a_name_in_code_is_found(source: Path, package: str, code: str, name: str) -> None:
    plant(source, f"{package}/deep/planted.py", code)
    assert {(finding.file, finding.name) for finding in find(source)} == {(f"{package}/deep/planted.py", name)}


@pytest.mark.parametrize(
    "code",
    [
        "requested = adapter = knormal = 1",
        "strategy = 'full'",
        "text = 'a request to adapt'",
        "rows = 1  # as quest chooses them",
        'def cut():\n    """As H2O does: h2o(heavy=0.1)."""',
        "from kvatlas.strategies.stage import Keep\nisinstance(stage, Keep)",
    ],
)
def test_prose_parts_of_words_and_bases_are_not(source: Path, code: str) -> None:
    plant(source, "engine/planted.py", code)
    assert not list(find(source))


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from kvatlas.strategies.keep.full import Full", "Full"),
        ("from kvatlas.strategies.encode import kivi", "kivi"),
        ("import kvatlas.strategies.place.offload", "offload"),
        ("isinstance(stage, Offload)", "Offload"),
        ("issubclass(stage, (int, stages.Int8))", "Int8"),
        ("isinstance(stage, Kivi | None)", "Kivi"),
        ("match stage:\n    case Full(): pass", "Full"),
    ],
)
@pytest.mark.parametrize("package", ["cli", "experiments", "storage"])
def test_a_class_of_one_stage_is_found_everywhere(source: Path, package: str, code: str, name: str) -> None:
    plant(source, f"{package}/planted.py", code)
    assert {finding.name for finding in find(source)} == {name}


def test_names_may_stand_where_strategies_are_chosen(source: Path) -> None:
    plant(source, "cli/planted.py", "example = 'snapkv'\nh2o = 1")
    assert not list(find(source))


def test_what_is_allowed_must_be_there(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(source, "engine/planted.py", "\nquest = 1")
    assert main(source, []) == 1
    assert "src/kvatlas/engine/planted.py:2: 'quest' in quest" in capsys.readouterr().err
    assert main(source, [("engine/planted.py", "quest")]) == 0
    assert main(source, [("engine/planted.py", "quest"), ("engine/gone.py", "h2o")]) == 1
    assert "src/kvatlas/engine/gone.py: 'h2o' is no longer there" in capsys.readouterr().err


def test_each_exception_has_a_reason() -> None:
    assert all(ALLOWED.values())


@pytest.mark.parametrize(
    ("identifier", "parts"),
    [("SnapKV", "snap kv"), ("H2OKivi", "h2o kivi"), ("_quest_pages", "quest pages"), ("Int8Keep", "int8 keep")],
)
def test_words_of_names(identifier: str, parts: str) -> None:
    assert words(identifier) == tuple(parts.split())
