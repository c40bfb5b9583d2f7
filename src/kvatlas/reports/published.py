"""What the study reports (arXiv:2604.05012), in one place, for tables and for marks in figures.

Every number is second-hand: from a reading note of version 2; the paper itself was not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

TRUST = "second-hand"
SOURCE = (
    "arXiv:2604.05012, as told by one reading note of its version 2; the paper itself was not seen, so the study's "
    "numbers are second-hand. It used Llama-3.1-8B on NVIDIA H100 GPUs, its own H2O inside FlexGen with a "
    "heavy-hitter ratio of 0.3, and InfiniGen with a retention budget of 0.3."
)

BUDGET = 0.3
CONTEXTS = (1000, 8192)
LONG_CONTEXTS = (4000, 8192)
# Tokens: what vLLM reaches, and where the materialised score matrix ends the others.
REACH_FULL = 128_000
REACH_MATERIALISED = (10_000, 12_000)
CONCURRENCY = 96
# From 16 requests to 96: how far the study follows a growth.
GROWTH = 6
OUTPUT_TOKENS = 8192

# Early facts retained, as shares, at a kept fraction of 0.3 and contexts of 1K to 8K.
RETAINED = {"full": (0.94, 0.96), "infinigen": (0.92, 0.94), "h2o": (0.70, 0.78)}
EARLY_GAP = -0.27
# Loss of accuracy at a kept fraction of 0.1: mean of six tasks, and the two tasks named for H2O.
LOSS_BUDGET = 0.1
LOSS = {"infinigen": (-0.06, -0.06), "h2o": (-0.23, -0.16)}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published range, for a figure: a box from (x_low, low) to (x_high, high).

    Args:
        family: whose colour it takes.
        x_low: smallest x it was given for.
        x_high: largest.
        low: in the unit of the figure's samples.
        high: the same.
        budget: the kept fraction it holds for, or None where that is x.
    """

    family: str
    x_low: float
    x_high: float
    low: float
    high: float
    budget: float | None = None


RETENTION_REFERENCES = tuple(
    Reference(
        family=name,
        x_low=CONTEXTS[0],
        x_high=CONTEXTS[1],
        low=low,
        high=high,
        budget=None if name == "full" else BUDGET,
    )
    for name, (low, high) in RETAINED.items()
)
GAP_REFERENCES = (
    Reference(
        family="h2o", x_low=LONG_CONTEXTS[0], x_high=LONG_CONTEXTS[1], low=EARLY_GAP, high=EARLY_GAP, budget=BUDGET
    ),
)
LOSS_REFERENCES = tuple(
    Reference(family=name, x_low=LOSS_BUDGET, x_high=LOSS_BUDGET, low=low, high=high)
    for name, (low, high) in LOSS.items()
)
