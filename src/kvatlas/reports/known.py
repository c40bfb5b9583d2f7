"""What reports know of each experiment: its heading, what it sweeps, and the words for its conditions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Known:
    """An experiment that has figures here; any other is shown as a table.

    Args:
        heading: of its section.
        swept: the param on the x axis, or None.
        one: where it compares, for the answer, if it has one condition.
        several: the same for more, with ``{}`` for their number.
        optional: True for what no sweep runs by itself, so that its absence is no gap.
    """

    heading: str
    swept: str | None
    one: str
    several: str
    optional: bool = False


# name, heading, swept param, one condition, several conditions
KNOWN: dict[str, Known] = {
    name: Known(heading=heading, swept=swept, one=one, several=several, optional=name == "evaluate")
    for name, heading, swept, one, several in (
        ("prompt_length", "Prompt length", "prompt_tokens", "At one prompt length", "At {} prompt lengths"),
        ("offload_breakdown", "Offloading, part by part", None, "In one breakdown", "In {} breakdowns"),
        ("concurrency_memory", "Memory under load", "concurrency", "At one load, memory", "At {} loads, memory"),
        ("decode_throughput", "Throughput", "concurrency", "At one load, throughput", "At {} loads, throughput"),
        ("request_latency", "Request latency", "concurrency", "At one load, latency", "At {} loads, latency"),
        ("output_length", "Output length", "output_tokens", "At one output length", "At {} output lengths"),
        ("accuracy_budget", "Accuracy and budget", "budget", "At one kept fraction", "At {} kept fractions and tasks"),
        ("early_fact", "Early facts", "context_tokens", "At one context and budget", "At {} contexts and budgets"),
        ("request_rate", "Request rate", "rate", "At one request rate", "At {} request rates"),
        ("trace_replay", "Trace replay", None, "On one replayed trace", "On {} replayed traces"),
        ("model_size", "Model size", None, "On one model", "On {} models"),
        ("evaluate", "Benchmarks of lm-eval", None, "On one benchmark", "On {} benchmarks"),
    )
}

AXES = {
    "prompt_tokens": "Prompt length (tokens)",
    "concurrency": "Concurrent requests",
    "context_tokens": "Context length (tokens)",
    "output_tokens": "Output length (tokens)",
    "budget": "Kept fraction (%)",
    "rate": "Requests per second",
    "turns": "Turns of the conversation",
    "parameters": "Parameters (millions)",
}

CONDITIONS = {
    "prompt_tokens": "{:,.10g} tokens",
    "concurrency": "{:,.10g} at once",
    "context_tokens": "{:,.10g} tokens",
    "output_tokens": "{:,.10g} output tokens",
    "rate": "{:,.3g} requests/s",
}


def heading(experiment: str) -> str:
    """Return the experiment's heading; an unknown one's name."""
    known = KNOWN.get(experiment)
    return known.heading if known else experiment


def swept(experiment: str) -> str | None:
    """Return the param on the x axis, or None."""
    known = KNOWN.get(experiment)
    return known.swept if known else None
