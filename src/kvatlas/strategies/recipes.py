"""Papers' systems as sentences: a name, its composition with the paper's defaults, and the citation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named composition.

    Args:
        sentence: the composition, in the grammar of strategies.
        paper: who proposed it.
        label: what it is called in tables.
    """

    sentence: str
    paper: str
    label: str


RECIPES = {
    "full": Recipe(sentence="full", paper="Kwon et al., SOSP 2023, arXiv:2309.06180", label="paged baseline"),
    "streaming_llm": Recipe(
        sentence="streaming_llm(sinks=4, recent=512)",
        paper="Xiao et al., ICLR 2024, arXiv:2309.17453",
        label="StreamingLLM",
    ),
    "infinigen": Recipe(
        sentence="rehearse(alpha=4.0, cap=0.2, partial=0.3) | offload(host)",
        paper="Lee et al., OSDI 2024, arXiv:2406.19707",
        label="InfiniGen",
    ),
    "rocketkv": Recipe(
        sentence="snapkv(budget=0.25, window=32, pool=63, pooling=max) | rocket(budget=512, page=4)",
        paper="Fu et al., ICML 2025, arXiv:2502.14051",
        label="RocketKV",
    ),
    "h2o": Recipe(
        sentence="h2o(heavy=0.1, recent=0.1)", paper="Zhang et al., NeurIPS 2023, arXiv:2306.14048", label="H2O"
    ),
}

FORMER_NAMES = {"speculate": "rehearse"}
"""What stages were called before -> their names; such sentences are understood."""

OTHER_NAMES = {"int4": "kivi(bits=4)", "int2": "kivi(bits=2)"}
"""What is called otherwise elsewhere -> how it is written here."""
