"""Folders: the cache, and those that are made for a file and go again if it does not come to be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def cache_folder() -> Path:
    """Return where files live that can be made again: ``$KVATLAS_CACHE``, else ``kvatlas`` in the user's cache."""
    if chosen := os.environ.get("KVATLAS_CACHE"):
        return Path(chosen)
    users = os.environ.get("XDG_CACHE_HOME", "")
    # The standard has relative paths ignored.
    return (Path(users) if os.path.isabs(users) else Path.home() / ".cache") / "kvatlas"


def missing_folders(folder: Path) -> list[Path]:
    """Return the folder and those above it that do not exist yet, innermost first."""
    return [each for each in (folder, *folder.parents) if not os.path.exists(each)]  # a name may be too long to ask for


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not made after all, or somebody has put something there
            return
