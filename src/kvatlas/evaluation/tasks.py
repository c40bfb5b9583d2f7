"""Find the tasks of lm-eval, with their data at hand, before anything is asked."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvatlas.core.errors import UnsupportedError
from kvatlas.core.messages import told
from kvatlas.core.names import unknown_name

HOW_TO_INSTALL = "lm-eval is not installed; install it with: pip install 'kvatlas[eval]'"


def load_tasks(names: Sequence[str], include: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's task manager, and its tasks by name, groups opened, with their data at hand.

    Raises:
        UnsupportedError: lm-eval is not installed, or a task's data cannot be had.
        UnknownNameError: a task does not exist.
    """
    lm_eval_version()
    from lm_eval.tasks import TaskManager

    manager = None if include is None else TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):  # reading all of lm-eval's own takes seconds
        manager = TaskManager(include_path=None if include is None else str(include))
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in manager.all_tasks:
            raise unknown_name("task", name, manager.all_tasks)
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # datasets, the hub's client and file systems raise anything here
            raise UnsupportedError(
                f"the data of task {name!r} cannot be had ({told(error)}); connect to the Hugging Face hub, "
                "fill its cache beforehand (HF_HOME), or name local files in a task file of your own (--include)"
            ) from error
    return manager, tasks


def lm_eval_version() -> str:
    """Return the version of lm-eval.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedError(HOW_TO_INSTALL) from error
