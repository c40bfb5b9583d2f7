"""Conversations of people with models, and what is asked of an engine with them: prompts, sessions, a trace.

Lengths come from a tokenizer where there is one. Without one they are estimates, characters / 4, and are called so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.workloads.arrivals import poisson_arrivals
from kvatlas.workloads.lines import Place
from kvatlas.workloads.request import Trace, TraceRequest

Encode = Callable[[str], Sequence[int]]

CHARACTERS_PER_TOKEN = 4
USER, ASSISTANT = "user", "assistant"

_ROLES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side said.

    Args:
        role: "user", "assistant", or another name in lower case, such as "system".
        text: may be empty.
    """

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation as recorded.

    Args:
        id: its name in the source.
        turns: in order; may be empty.
        model: who answered, or None where the source does not say.
        language: as the source calls it, or None.
    """

    id: str
    turns: tuple[Turn, ...]
    model: str | None = None
    language: str | None = None

    @property
    def exchanges(self) -> list[tuple[str, str]]:
        """What the user said and what was answered, pair by pair.

        Successive turns of one side count as one, joined by a line break; other roles, an answer before the first
        question, and a last question without an answer are left out.
        """
        sides: list[tuple[str, str]] = []
        for turn in self.turns:
            if turn.role not in (USER, ASSISTANT) or (not sides and turn.role == ASSISTANT):
                continue
            if sides and sides[-1][0] == turn.role:
                sides[-1] = (turn.role, f"{sides[-1][1]}\n{turn.text}")
            else:
                sides.append((turn.role, turn.text))
        texts = [text for _, text in sides]
        return list(zip(texts[::2], texts[1::2], strict=False))


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which lengths are kept; the defaults are those of vLLM's ``bench`` for ShareGPT.

    Args:
        min_tokens: fewest tokens of a prompt, and of a reply.
        max_prompt_tokens: most tokens of a prompt; None for any number.
        max_total_tokens: most tokens of a prompt and its reply; None for any number.

    Raises:
        ConfigError: a number is below 1.
    """

    min_tokens: int = 4
    max_prompt_tokens: int | None = 1024
    max_total_tokens: int | None = 2048

    def __post_init__(self) -> None:
        for name in ("min_tokens", "max_prompt_tokens", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; want at least 1")

    def keeps(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether a prompt of this length with a reply of this length is kept."""
        total = prompt_tokens + output_tokens
        return (
            min(prompt_tokens, output_tokens) >= self.min_tokens
            and (self.max_prompt_tokens is None or prompt_tokens <= self.max_prompt_tokens)
            and (self.max_total_tokens is None or total <= self.max_total_tokens)
        )

    def __str__(self) -> str:
        most = [
            f"{what} of at most {number} tokens"
            for what, number in (("prompts", self.max_prompt_tokens), ("prompt and reply", self.max_total_tokens))
            if number is not None
        ]
        return ", ".join([f"prompts and replies of at least {self.min_tokens}", *most])


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt as text, and how long the recorded reply was.

    Args:
        prompt: what the user said.
        prompt_tokens: its length; an estimate where there was no tokenizer.
        output_tokens: the reply's length, likewise.
    """

    prompt: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class SessionPlan:
    """A whole conversation, to be replayed turn by turn on one cache.

    Args:
        id: the conversation's.
        asks: the user's turns, at least one.
    """

    id: str
    asks: tuple[Ask, ...]

    @property
    def total_tokens(self) -> int:
        """Tokens of all prompts and replies."""
        return sum(ask.prompt_tokens + ask.output_tokens for ask in self.asks)


def estimated_tokens(text: str) -> int:
    """Return a guess at the number of tokens: a quarter of the characters, rounded up."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def first_asks(
    conversations: Iterable[Conversation], encode: Encode | None = None, *, pruning: Pruning | None = None
) -> Iterator[tuple[int, Conversation, Ask]]:
    """Yield (number, conversation, ask) of each conversation's first exchange whose lengths are kept.

    vLLM's ``bench`` takes the first two turns, whoever said them; here it is the first question with its answer.

    Args:
        conversations: in order; numbered from 0.
        encode: text to token ids, without special tokens; None estimates lengths.
        pruning: which lengths are kept; vLLM's if None.
    """
    kept = Pruning() if pruning is None else pruning
    for number, conversation in enumerate(conversations):
        for prompt, reply in conversation.exchanges[:1]:
            ask = _ask(prompt, reply, encode)
            if kept.keeps(ask.prompt_tokens, ask.output_tokens):
                yield number, conversation, ask


def session_plans(
    conversations: Iterable[Conversation],
    encode: Encode | None = None,
    *,
    min_turns: int = 2,
    max_total_tokens: int | None = None,
) -> Iterator[SessionPlan]:
    """Yield whole conversations, for `kvatlas.engine.llm.LLM.session` for instance.

    A conversation ends before an exchange with an empty side, and before the one that would exceed
    ``max_total_tokens``; if fewer than ``min_turns`` are left it is passed over.

    Args:
        conversations: in order.
        encode: text to token ids, without special tokens; None estimates lengths.
        min_turns: fewest questions of a session, at least 1.
        max_total_tokens: most tokens of all prompts and replies; None for any number.

    Raises:
        ConfigError: ``min_turns`` is below 1.
    """
    if min_turns < 1:
        raise ConfigError(f"min_turns is {min_turns}; want at least 1")
    for conversation in conversations:
        asks: list[Ask] = []
        total = 0
        for prompt, reply in conversation.exchanges:
            ask = _ask(prompt, reply, encode)
            total += ask.prompt_tokens + ask.output_tokens
            fits = max_total_tokens is None or total <= max_total_tokens
            if not (fits and ask.prompt_tokens and ask.output_tokens):
                break
            asks.append(ask)
        if len(asks) >= min_turns:
            yield SessionPlan(id=conversation.id, asks=tuple(asks))


def conversation_trace(
    path: Path,
    conversations: Iterable[Conversation],
    encode: Encode | None = None,
    *,
    pruning: Pruning | None = None,
    limit: int | None = None,
) -> Trace:
    """Return the first exchanges of a file as a trace; its notes tell what was made up.

    Such files hold no arrival times: they are drawn, Poisson at one request per second, so that a time scale of 0.1
    is a rate of ten per second.

    Args:
        path: where the conversations come from; the trace is named after it.
        conversations: read as far as needed.
        encode: text to token ids, without special tokens; None estimates lengths.
        pruning: which lengths are kept; vLLM's if None.
        limit: most requests; None for all.

    Raises:
        TraceError: nothing is left.
        ConfigError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; want at least 1, or None")
    kept = Pruning() if pruning is None else pruning
    found: list[tuple[int, Conversation, Ask]] = []
    for one in first_asks(conversations, encode, pruning=kept):
        found.append(one)
        if len(found) == limit:
            break
    if not found:
        raise TraceError(f"{path} holds no conversation that begins with a question and an answer, with {kept}")
    times = poisson_arrivals(len(found), 1.0, seed=0)
    requests = tuple(
        TraceRequest(
            number=number,
            arrival_s=at - times[0],
            prompt_tokens=ask.prompt_tokens,
            output_tokens=ask.output_tokens,
            session=conversation.id,
        )
        for at, (number, conversation, ask) in zip(times, found, strict=True)
    )
    notes = [f"first question and answer of each conversation; {kept}", "arrivals drawn: Poisson, 1 request/s"]
    if encode is None:
        notes.append(f"lengths are estimates: characters / {CHARACTERS_PER_TOKEN}, since no tokenizer was given")
    return Trace(name=path.stem, source=str(path), licence="not stated", requests=requests, notes=tuple(notes))


def turn_of(place: Place, turn: object, role_name: str, text_name: str) -> Turn:
    """Return a turn from a row's object, such as ``{"from": "human", "value": "Hello"}``.

    Raises:
        TraceError: it has not these two texts.
    """
    role = turn.get(role_name) if isinstance(turn, dict) else None
    text = turn.get(text_name) if isinstance(turn, dict) else None
    if not isinstance(role, str) or not isinstance(text, str):
        raise place.error(turn, f"a turn with the texts {role_name!r} and {text_name!r}")
    name = role.strip().lower()
    return Turn(role=_ROLES.get(name, name), text=text)


def _ask(prompt: str, reply: str, encode: Encode | None) -> Ask:
    lengths = [estimated_tokens(text) if encode is None else len(encode(text)) for text in (prompt, reply)]
    return Ask(prompt=prompt, prompt_tokens=lengths[0], output_tokens=lengths[1])
