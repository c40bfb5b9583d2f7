"""What the author of a strategy checks in tests of their own; needs no test runner.

Each check runs a tiny random model on the CPU for about a second and raises an AssertionError that says what differed.
"""

from __future__ import annotations

from kvatlas.testing.checks import check_books, check_full_budget, check_parity, check_retold, run
from kvatlas.testing.driving import Job, drive, kept_positions
from kvatlas.testing.model import tiny_model, tokens
from kvatlas.testing.retelling import Retelling, Token

__all__ = [
    "Job",
    "Retelling",
    "Token",
    "check_books",
    "check_full_budget",
    "check_parity",
    "check_retold",
    "drive",
    "kept_positions",
    "run",
    "tiny_model",
    "tokens",
]
