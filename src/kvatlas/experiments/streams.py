"""What a streamed completion says: its events, however packets cut them, and when each token was there.

The format is that of OpenAI's ``/v1/completions`` with ``stream``: lines ``data: {...}``, one JSON object each, and
``data: [DONE]`` last. Servers differ in the rest: several tokens per chunk, an empty chunk that opens the stream before
any token, chunks without text in the middle, reasoning apart from text, a closing chunk with a finish reason alone,
token ids or a count of usage, or neither.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from kvatlas.core.errors import EndpointError

_DONE = "[DONE]"
_SHOWN = 200
_TEXTS = ("text", "reasoning_content", "reasoning")  # an answer's own, and a train of thought's under either name


class EventLines:
    """Bytes of an event stream -> the data of its events; comments and other fields are left out.

    Works on bytes, because a packet may end inside a character, and splits at newlines alone, because JSON text may
    hold the other characters that Python takes for line ends.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, packet: bytes) -> list[str]:
        """Return the data of the events that this packet completes."""
        *lines, self._rest = (self._rest + packet).split(b"\n")
        return [data for line in lines if (data := _data(line))]

    def close(self) -> list[str]:
        """Return what a last line without newline holds."""
        return self.feed(b"\n")


def _data(line: bytes) -> str:
    field_name, _, value = line.partition(b":")
    return value.decode("utf-8", errors="replace").strip() if field_name.strip() == b"data" else ""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One event that may hold tokens.

    Args:
        at_s: when it was read.
        num_tokens: as its token ids say; None where the server sends none.
        counted: output tokens so far, itself included, where the server tells with every event.
        text_chars: length of the text it carries; a token may have none, and a chunk without text may have no token.
        closes: whether it carries a finish reason.
    """

    at_s: float
    num_tokens: int | None = None
    counted: int | None = None
    text_chars: int = 1
    closes: bool = False

    @property
    def has_text(self) -> bool:
        """Whether it carries text."""
        return self.text_chars > 0


@dataclass(kw_only=True)
class Reply:
    """What has come of one streamed completion."""

    chunks: list[Chunk] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    def add(self, data: str, now_s: float) -> None:
        """Take one event in.

        Raises:
            EndpointError: it reports an error, or is not a JSON object.
        """
        if data == _DONE:
            self.done = True
            return
        event = _event(data)
        if event.get("error") or event.get("object") == "error":
            raise EndpointError(f"the stream reports: {error_text(event)}")
        usage, choices = event.get("usage"), event.get("choices")
        self.usage = usage if isinstance(usage, dict) else self.usage
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self.chunks.append(_chunk(choices[0], usage, now_s))

    @property
    def complete(self) -> bool:
        """Whether the server said that it had finished."""
        return self.done or any(chunk.closes for chunk in self.chunks)

    @property
    def token_times_s(self) -> tuple[float, ...]:
        """When each output token was there; empty without tokens."""
        return token_times(self.chunks, self.count("completion_tokens"))

    @property
    def counted(self) -> bool:
        """Whether the server told how many tokens there are; else each chunk is taken for one."""
        return self.count("completion_tokens") is not None or any(chunk.num_tokens is not None for chunk in self.chunks)

    def count(self, name: str) -> int | None:
        """Return a number of the server's usage, or None where it gives none."""
        return _count(self.usage, name)

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that the server took from its prefix cache, where it tells."""
        details = self.usage.get("prompt_tokens_details")
        value = details.get("cached_tokens") if isinstance(details, dict) else None
        return value if isinstance(value, int) else None


def token_times(chunks: Sequence[Chunk], counted: int | None) -> tuple[float, ...]:
    """Return one time per output token: the time of the chunk that brought it.

    Token ids say it exactly, and so does a count beside all text. Without them the server's last count is divided among
    the chunks that hold tokens, in proportion to their text, the first token in the first of them and the last in the
    last; without a count each is one token.

    Args:
        chunks: in the order in which they came.
        counted: completion tokens as the server counted them, or None.
    """
    if any(chunk.num_tokens is not None for chunk in chunks):
        return tuple(chunk.at_s for chunk in chunks for _ in range(chunk.num_tokens or 0))
    running = _running(chunks)
    if running is not None and running[-1] == counted:
        news = (later - earlier for earlier, later in pairwise([0, *running]))
        return tuple(chunk.at_s for chunk, new in zip(chunks, news, strict=True) for _ in range(new))
    bearing = _bearing(chunks, counted)
    if not bearing or counted == 0:
        return ()
    return tuple(bearing[place].at_s for place in _places(bearing, len(bearing) if counted is None else counted))


def _running(chunks: Sequence[Chunk]) -> list[int] | None:
    """Return how many tokens there were with each chunk; None unless the server says so beside all text."""
    found, last = [], 0
    for chunk in chunks:
        if (chunk.counted is None and chunk.has_text) or (chunk.counted or last) < last:
            return None
        last = last if chunk.counted is None else chunk.counted
        found.append(last)
    return found or None


def _bearing(chunks: Sequence[Chunk], counted: int | None) -> list[Chunk]:
    """Return the chunks taken to hold tokens: as many as were counted, if one reading of empty text gives that.

    Empty text in the middle is a token that ends inside a character. Before all text it is what servers open a stream
    with, and with a finish reason it is no token, unless the count says so.
    """
    first = next((place for place, chunk in enumerate(chunks) if chunk.has_text), len(chunks))
    begun = list(chunks[first:])
    readings = [
        [chunk for chunk in begun if chunk.has_text or not chunk.closes],
        begun,
        [chunk for chunk in chunks if chunk.has_text or not chunk.closes],
        list(chunks),
        [chunk for chunk in chunks if chunk.has_text],
    ]
    fitting = next((found for found in readings if len(found) == counted), None)
    if fitting is not None or begun or not counted:
        return readings[0] if fitting is None else fitting
    return readings[2] or readings[3]  # tokens without any text


def _places(bearing: Sequence[Chunk], total: int) -> list[int]:
    """Return for each of ``total`` tokens which of the chunks brought it, ascending."""
    last = len(bearing) - 1
    if total <= last:  # not even one each: evenly from the first to the last
        return [round(k * last / max(total - 1, 1)) for k in range(total)]
    chars = list(accumulate(chunk.text_chars for chunk in bearing))
    shares = [so_far / chars[-1] if chars[-1] else (place + 1) / len(bearing) for place, so_far in enumerate(chars)]
    ends = [min(max(round(total * share), place + 1), total - last + place) for place, share in enumerate(shares)]
    return [place for place, (low, high) in enumerate(pairwise([0, *ends])) for _ in range(low, high)]


def error_text(body: object) -> str:
    """Return what an error body says, in one line of at most 200 characters."""
    found = body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    text = " ".join((found if isinstance(found, str) else json.dumps(found)).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EndpointError(f"the stream holds {error_text(data)!r}, which is not JSON") from error
    if not isinstance(event, dict):
        raise EndpointError(f"the stream holds {error_text(data)!r}, which is not a JSON object")
    return event


def _chunk(choice: dict[str, Any], usage: object, now_s: float) -> Chunk:
    ids = choice.get("token_ids")
    return Chunk(
        at_s=now_s,
        num_tokens=len(ids) if isinstance(ids, list) else None,
        counted=_count(usage, "completion_tokens") if isinstance(usage, dict) else None,
        text_chars=sum(len(text) for name in _TEXTS if isinstance(text := choice.get(name), str)),
        closes=bool(choice.get("finish_reason")),
    )
