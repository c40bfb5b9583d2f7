"""Small real excerpts of public traces, shipped with the package: enough to try a replay, not to conclude.

Sources, licences and citations: ``data/README.md``; the licence texts lie beside the files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import as_file, files

from kvatlas.core.names import unknown_name
from kvatlas.workloads.trace import Trace, read_trace


@dataclass(frozen=True, kw_only=True)
class _Excerpt:
    file: str
    source: str
    licence: str


_EXCERPTS = {
    "azure-conv": _Excerpt(
        file="azure-conv-200.csv",
        source="Azure/AzurePublicDataset at b469a11, data/AzureLLMInferenceTrace_conv.csv, first 200",
        licence="CC-BY-4.0",
    ),
    "mooncake-conversation": _Excerpt(
        file="mooncake-conversation-200.jsonl",
        source="kvcache-ai/Mooncake at 3b5a594, FAST25-release/traces/conversation_trace.jsonl, first 200",
        licence="Apache-2.0",
    ),
}

EXCERPT_NAMES = tuple(_EXCERPTS)


def load_excerpt(name: str) -> Trace:
    """Return a bundled trace of 200 requests: "azure-conv" or "mooncake-conversation".

    Raises:
        UnknownNameError: no excerpt has this name.
    """
    if name not in _EXCERPTS:
        raise unknown_name("trace excerpt", name, EXCERPT_NAMES)
    excerpt = _EXCERPTS[name]
    with as_file(files("kvatlas.workloads") / "data" / excerpt.file) as path:
        trace = read_trace(path)
    return replace(trace, name=name, source=excerpt.source, licence=excerpt.licence)
