import errno
import os
from pathlib import Path

import pytest

from kvatlas.core.errors import OutputError
from kvatlas.reports.files import write_files

FILES = {"figures/a.png": b"a", "index.html": b"page"}


def test_a_report_lands_whole(tmp_path):
    write_files(tmp_path / "a" / "b", FILES)
    found = {str(path.relative_to(tmp_path / "a" / "b")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert found == set(FILES)


@pytest.mark.parametrize(("number", "step"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "another folder")])
@pytest.mark.parametrize("at", range(len(FILES)))
def test_a_report_that_fails_leaves_nothing(tmp_path, monkeypatch, number, step, at):
    written = []

    def write(path, content):
        written.append(path)
        if len(written) > at:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", write)
    (tmp_path / "there").mkdir()
    for folder in ("there", "a/b"):
        written.clear()
        with pytest.raises(OutputError, match=step):
            write_files(tmp_path / folder, FILES)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
