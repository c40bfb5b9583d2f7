"""kvatlas: every KV-cache management strategy for LLM inference on one engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvatlas.core.needs import (
        Derived as Derived,
        Logprobs as Logprobs,
        QueryMoments as QueryMoments,
        Received as Received,
        RecentQueries as RecentQueries,
        Record as Record,
    )
    from kvatlas.core.plan import Traits as Traits
    from kvatlas.core.views import (
        ChunkView as ChunkView,
        Given as Given,
        LaneView as LaneView,
        QueryView as QueryView,
        Selection as Selection,
        TokenView as TokenView,
    )
    from kvatlas.core.vocabulary import Per as Per, Saves as Saves
    from kvatlas.engine.attach import attach as attach, detach as detach
    from kvatlas.engine.llm import LLM as LLM
    from kvatlas.engine.params import SamplingParams as SamplingParams
    from kvatlas.strategies.registry import register as register
    from kvatlas.strategies.stage import (
        Attend as Attend,
        Budget as Budget,
        Encode as Encode,
        Keep as Keep,
        Limits as Limits,
        Place as Place,
        Reach as Reach,
        Stage as Stage,
        StageInfo as StageInfo,
        check_share as check_share,
        tokens_of as tokens_of,
    )
    from kvatlas.strategies.strategy import Strategy as Strategy

__version__ = "0.1.0"

# Loaded on first use, so that commands which only plan, list or report never load torch.
_LAZY = {
    "LLM": "kvatlas.engine.llm",
    "SamplingParams": "kvatlas.engine.params",
    "Strategy": "kvatlas.strategies.strategy",
    "attach": "kvatlas.engine.attach",
    "detach": "kvatlas.engine.attach",
    # what a strategy of one's own is made of
    **dict.fromkeys(("Stage", "Keep", "Budget", "Encode", "Place", "Attend"), "kvatlas.strategies.stage"),
    **dict.fromkeys(("Limits", "Reach", "check_share", "tokens_of"), "kvatlas.strategies.stage"),
    **dict.fromkeys(("Derived", "Logprobs", "QueryMoments"), "kvatlas.core.needs"),
    **dict.fromkeys(("Received", "RecentQueries", "Record"), "kvatlas.core.needs"),
    **dict.fromkeys(("ChunkView", "Given", "LaneView", "QueryView", "Selection"), "kvatlas.core.views"),
    "Per": "kvatlas.core.vocabulary",
    "Saves": "kvatlas.core.vocabulary",
    "StageInfo": "kvatlas.strategies.stage",
    "TokenView": "kvatlas.core.views",
    "Traits": "kvatlas.core.plan",
    "register": "kvatlas.strategies.registry",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvatlas' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
