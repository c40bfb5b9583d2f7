"""A request trace: who asks when, for how many tokens, sharing which prefixes. Lengths only, no text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvatlas.core.errors import TraceError


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """One request of a trace.

    Args:
        number: the request's place in its source, from 0; seeds what no hash covers.
        arrival_s: seconds after the first request of the trace.
        prompt_tokens: length of the prompt, at least 1.
        output_tokens: tokens to generate, at least 1.
        prefix_hashes: one id per block of the prompt, from its start; equal leading ids mean equal tokens.
            May cover less than the prompt, never more.
        hash_block_tokens: tokens per hashed block (the last may be shorter), or None without hashes.
        session: conversation that the request belongs to, or None.

    Raises:
        TraceError: a number is out of range, or hashes and lengths do not fit.
    """

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    hash_block_tokens: int | None = None
    session: str | None = None

    def __post_init__(self) -> None:
        if self.number < 0 or not (math.isfinite(self.arrival_s) and self.arrival_s >= 0):
            raise TraceError(f"request {self.number} arrives at {self.arrival_s} s; want a finite time >= 0")
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            lengths = f"{self.prompt_tokens} + {self.output_tokens}"
            raise TraceError(f"request {self.number} has {lengths} tokens; want at least 1 + 1")
        if not self.prefix_hashes:
            return
        if self.hash_block_tokens is None or self.hash_block_tokens < 1:
            raise TraceError(f"request {self.number} has hashes of {self.hash_block_tokens} tokens; want at least 1")
        blocks = math.ceil(self.prompt_tokens / self.hash_block_tokens)
        if len(self.prefix_hashes) > blocks:
            raise TraceError(
                f"request {self.number} has {len(self.prefix_hashes)} hashes, but {self.prompt_tokens} "
                f"tokens make {blocks} blocks of {self.hash_block_tokens}; is the block size right?"
            )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in order of arrival, and where they come from.

    Args:
        name: what reports call the trace.
        source: file, or repository and commit.
        licence: of the data, or "not stated".
        requests: at least one, sorted by arrival.
        notes: what was done to the trace since its source, one line each; reports print them.
    """

    name: str
    source: str
    licence: str
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.requests:
            raise TraceError(f"trace {self.name!r} from {self.source} holds no requests; want at least one")

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s

    @property
    def shared_fraction(self) -> float:
        """Fraction of hashed blocks, in [0, 1], that an endless prefix cache would have seen before."""
        seen: set[int] = set()
        hits = total = 0
        for request in self.requests:
            known = (hash_id in seen for hash_id in request.prefix_hashes)
            hits += next((i for i, hit in enumerate(known) if not hit), len(request.prefix_hashes))
            total += len(request.prefix_hashes)
            seen.update(request.prefix_hashes)
        return hits / total if total else 0.0
