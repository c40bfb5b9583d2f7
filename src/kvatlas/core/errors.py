"""Every error kvatlas raises for a user to act on, in one tree.

KvatlasError
├── ConfigError            a parameter is unknown, misspelt, out of range or of the wrong type
│   ├── UnknownNameError   a strategy, stage, parameter or experiment that does not exist ("did you mean ...?")
│   └── CompositionError   stages that cannot work together
├── CapacityError          something does not fit into memory, now or ever
├── UnsupportedError       a model family, device, format or call that kvatlas refuses, with the reason
├── CheckpointError        a model folder that is missing, incomplete or corrupt
├── TraceError             a line of a trace that cannot be read
├── EndpointError          a server that cannot be reached, or that serves nothing of what is asked
├── RecordsError           a records file that is locked, of another version, or not ours
└── OutputError            a path that cannot be written

A message names the value, what was expected, and the next step, in one line.
"""

from __future__ import annotations


class KvatlasError(Exception):
    """Base of all errors meant for users; the CLI prints its text alone and exits with status 2."""


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
