"""Writing a report whole: every file is finished beside its place before the first one moves there."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kvatlas.core.errors import OutputError
from kvatlas.core.folders import missing_folders, remove_empty


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written before any work is done; creates nothing.

    Raises:
        OutputError: it, or what it would lie in, is not a folder or not writable.
    """
    try:
        present = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    except OSError as error:  # a name that is too long, a loop of links
        raise OutputError(f"report folder {folder} cannot be made ({error.strerror}); choose another one") from error
    if not present.is_dir():
        raise OutputError(f"report folder {folder} cannot be made: {present} is not a folder; choose another one")
    if not os.access(present, os.W_OK | os.X_OK):
        raise OutputError(f"report folder {folder} cannot be written ({present} is read-only); choose another one")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write relative path -> contents into the folder, the last one last; other files there are left alone.

    Raises:
        OutputError: a file cannot be written; then none of them is, unless moving itself fails half-way, and no folder
            is left that was made for them.
    """
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as beside:
            for name, content in files.items():
                path = Path(beside, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(beside, name), folder / name)
    except OSError as error:
        step = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another folder"
        raise OutputError(f"report cannot be written to {folder} ({error.strerror}); {step}") from error
    finally:
        remove_empty(made)
