"""Which form of a kernel runs.

Here, so that every operation obeys the same switch and a doubtful result can be checked against the
references without editing code: ``KVATLAS_KERNELS=reference kvatlas ...``.
"""

from __future__ import annotations

import os

from kvatlas.core.errors import ConfigError

_CHOICES = ("auto", "reference")


def use_reference() -> bool:
    """Whether the environment asks for the reference forms; read at every call, so a test may switch.

    Raises:
        ConfigError: ``KVATLAS_KERNELS`` is neither ``auto`` nor ``reference``.
    """
    choice = os.environ.get("KVATLAS_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ConfigError(f"unknown KVATLAS_KERNELS {choice!r}; expected one of {', '.join(_CHOICES)}")
    return choice == "reference"
