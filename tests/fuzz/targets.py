"""All targets by name, and the surroundings that they run in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants
from tests.fuzz import checkpoints, commands, company, params, processes, prompts, strategies, studies, traces
from tests.fuzz.harness import Target

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET
    for module in (params, prompts, strategies, studies, traces, checkpoints, commands, company, processes)
}


@contextmanager
def own_surroundings(folder: Path) -> Iterator[None]:
    """Work in a folder of the run, on one thread, with a cache of its own and without the network."""
    before, offline, cache = Path.cwd(), constants.HF_HUB_OFFLINE, os.environ.get("KVATLAS_CACHE")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models gain nothing from more
    constants.HF_HUB_OFFLINE = True
    os.environ["KVATLAS_CACHE"] = str(folder / "cache")
    (folder / "workplace").mkdir(parents=True)
    os.chdir(folder / "workplace")
    try:
        yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        constants.HF_HUB_OFFLINE = offline
        if cache is None:
            del os.environ["KVATLAS_CACHE"]
        else:
            os.environ["KVATLAS_CACHE"] = cache
