"""kvatlas: every KV-cache management strategy for LLM inference on one engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvatlas.engine.attach import attach as attach, detach as detach
    from kvatlas.engine.llm import LLM as LLM
    from kvatlas.engine.params import SamplingParams as SamplingParams
    from kvatlas.strategies.strategy import Strategy as Strategy

__version__ = "0.1.0"

# Loaded on first use, so that commands which only plan, list or report never load torch.
_LAZY = {
    "LLM": "kvatlas.engine.llm",
    "SamplingParams": "kvatlas.engine.params",
    "Strategy": "kvatlas.strategies.strategy",
    "attach": "kvatlas.engine.attach",
    "detach": "kvatlas.engine.attach",
}

__all__ = ["LLM", "SamplingParams", "Strategy", "__version__", "attach", "detach"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvatlas' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
