"""Every error kvatlas raises for a user to act on, in one tree.

KvatlasError
├── ConfigError            a parameter is unknown, misspelt, out of range or of the wrong type
│   ├── UnknownNameError   a strategy, stage, parameter or experiment that does not exist ("did you mean ...?")
│   └── CompositionError   stages that cannot work together
├── CapacityError          something does not fit into memory, now or ever
├── UnsupportedError       a model family, device, format or call that kvatlas refuses, with the reason
├── RequestError           a request that failed while it ran; the others went on
├── CheckpointError        a model folder that is missing, incomplete or corrupt
├── TraceError             a line of a trace that cannot be read
├── EndpointError          a server that cannot be reached, or that serves nothing of what is asked
├── RecordsError           a records file that is locked, of another version, or not ours
└── OutputError            a path that cannot be written

A message names the value, what was expected, and the next step, in one line. A value may be a whole file by mistake,
so the middle of a long message is left out: the head tells what was read, the tail what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r"\S{200,}")


def one_line(message: str) -> str:
    """Return the message on one line of at most 700 characters that any terminal can show.

    Very long words, then the whole, lose their middle; what is not printable is written as an escape.
    """
    line = " ".join(message.splitlines())
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in line)
    line = _WORD.sub(lambda word: _without_middle(word[0], 80, 40), line)
    return _without_middle(line, 360, 240) if len(line) > 700 else line


def _without_middle(text: str, head: int, tail: int) -> str:
    return f"{text[:head]}...({len(text) - head - tail:,} characters)...{text[-tail:]}"


class KvatlasError(Exception):
    """Base of all errors meant for users; the CLI prints its text alone and exits with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(KvatlasError, ValueError):
    """A parameter has a value that cannot be used."""


class UnknownNameError(ConfigError):
    """A name is not registered."""


class CompositionError(ConfigError):
    """Stages that cannot work together were composed."""


class CapacityError(KvatlasError):
    """Something does not fit into the memory it was given."""


class UnsupportedError(KvatlasError):
    """A model, device, format or call that kvatlas refuses."""


class RequestError(KvatlasError):
    """A request failed while it ran; its cause says how. Those beside it went on.

    Args:
        message: which request, and what happened.
        outputs: what all requests of the call have generated, the failed one's part included, in the order given.
    """

    def __init__(self, message: str, outputs: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.outputs = list(outputs)


class CheckpointError(KvatlasError):
    """A model folder cannot be loaded."""


class TraceError(KvatlasError, ValueError):
    """A line of a request trace cannot be read."""


class EndpointError(KvatlasError):
    """A server cannot be reached, or serves nothing of what is asked."""


class RecordsError(KvatlasError):
    """A records file cannot be used."""


class OutputError(KvatlasError):
    """A file or folder cannot be written."""
