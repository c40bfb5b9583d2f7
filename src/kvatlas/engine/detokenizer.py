"""Text from tokens as they come, and the end of a text at a stop string."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import takewhile
from operator import itemgetter
from typing import Any, NamedTuple

from kvatlas.engine.request import Request

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A decoder may show each byte of an incomplete character as one of these, and each of the character before it (byte
# fallback does so while the bytes together are not valid): 3 + 4. What stands in a longer row is no text, but its
# last three may still become a character.
_MOST_INCOMPLETE, _LAST_CHARACTER = 7, 3
# Tokens that are decoded together at most, and how many remain then. Few outputs ever need as many.
_MOST_TOGETHER, _CONTEXT = 64, 16


class Detokenizer:
    """Extends each request's text by the token appended last.

    The text leaves out special tokens. Stop strings are searched in another one that has them, as transformers does
    under ``stop_strings``, so that ``"<|im_end|>"`` stops whether or not it is one token.

    Args:
        tokenizer: a tokenizer of transformers, or None where prompts and outputs are token ids only.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._outputs: dict[Request, _Output] = {}

    def advance(self, request: Request) -> bool:
        """Extend the text by the newest token; return whether a stop string has ended it.

        A token may complete a character that the ones before it began; the text grows by whole characters.
        """
        if self._tokenizer is None:
            return False
        ids, stops = request.output_ids, tuple(request.params.stop)
        output = self._outputs.setdefault(request, _Output())
        known = len(output.written_text)
        output.marks.append((known, len(request.text)))
        request.text += output.shown.extend(self._tokenizer, ids)
        if not stops:
            return False
        output.written_text += output.written.extend(self._tokenizer, ids)
        if len(ids) < request.params.min_tokens:
            return False
        starts = (output.written_text.find(stop, max(0, known - len(stop) + 1)) for stop in stops)
        first = min((start for start in starts if start >= 0), default=None)
        if first is not None:
            request.text += output.shown.rest(self._tokenizer, ids)
            request.text = request.text[: max(output.given, output.cut(request.text, first))]
        return first is not None

    def take(self, request: Request, *, finished: bool) -> str:
        """Return the text to give out now: all of it at the end, before that what no stop string can cut any more."""
        output = self._outputs.get(request)
        if output is None:
            return ""
        held = max(map(len, request.params.stop), default=1) - 1
        if finished:
            request.text += output.shown.rest(self._tokenizer, request.output_ids)
            held = 0
        begin, output.given = output.given, max(output.given, len(request.text) - held)
        return request.text[begin : output.given]

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request that has ended."""
        self._outputs.pop(request, None)

    def mark(self, request: Request) -> TextMark | None:
        """Return what `restore` needs; None: nothing is remembered of the request yet."""
        output = self._outputs.get(request)
        if output is None:
            return None
        return TextMark(
            output, replace(output.shown), replace(output.written), len(output.marks), output.written_text, output.given
        )

    def restore(self, request: Request, mark: TextMark | None) -> None:
        """Forget what came after a mark."""
        if mark is None:
            self.forget(request)
            return
        output = mark.output
        output.shown, output.written = mark.shown, mark.written
        output.written_text, output.given = mark.written_text, mark.given
        del output.marks[mark.marks :]
        self._outputs[request] = output


@dataclass
class _Window:
    """The last tokens of an output, decoded together, because a token's text depends on those before it.

    Args:
        skip_special: leave out special tokens.
        begin: first token that is decoded.
        middle: first token after those whose text was complete. It is the next ``begin``: some decoders drop the space
            before the first word, so there must be a word before a new one.
        given: characters of the decoded tokens that are part of the text already.
    """

    skip_special: bool
    begin: int = 0
    middle: int = 0
    given: int = 0

    def extend(self, tokenizer: Any, ids: list[int]) -> str:
        """Return the text that the newest token adds for certain."""
        text = self._decoded(tokenizer, ids, self.begin)
        incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
        if incomplete > _MOST_INCOMPLETE:
            incomplete = _LAST_CHARACTER
        until = max(self.given, len(text) - incomplete)
        added, self.given = text[self.given : until], until
        held = len(text) - until
        if not held and added:
            self._move(tokenizer, ids, self.middle, held)
            self.middle = len(ids)
        elif len(ids) - self.begin > _MOST_TOGETHER:
            self._move(tokenizer, ids, len(ids) - _CONTEXT, held)
        return added

    def rest(self, tokenizer: Any, ids: list[int]) -> str:
        """Return the text that was held back because a character is incomplete; it will not be completed."""
        text = self._decoded(tokenizer, ids, self.begin)
        added, self.given = text[self.given :], len(text)
        return added

    def _move(self, tokenizer: Any, ids: list[int], begin: int, held: int) -> None:
        """Decode from a later token on; ``held`` last characters are not given out yet."""
        text = self._decoded(tokenizer, ids, begin)
        if len(text) > held:
            self.begin, self.given = begin, len(text) - held

    def _decoded(self, tokenizer: Any, ids: list[int], begin: int) -> str:
        text: str = tokenizer.decode(ids[begin:], skip_special_tokens=self.skip_special)
        return text


@dataclass
class _Output:
    """What is remembered of one output.

    Args:
        marks: for each token, the lengths of the written and the shown text before it.
        written_text: all that the model has written, special tokens included; kept where there are stop strings.
        given: characters of the shown text that were given out.
    """

    shown: _Window = field(default_factory=lambda: _Window(skip_special=True))
    written: _Window = field(default_factory=lambda: _Window(skip_special=False))
    marks: list[tuple[int, int]] = field(default_factory=list)
    written_text: str = ""
    given: int = 0

    def cut(self, text: str, first: int) -> int:
        """Return how much of the shown text stands before a character of the written text.

        Both grow token by token. Within the token in question they end alike, unless it is special.
        """
        index = bisect_right(self.marks, first, key=itemgetter(0)) - 1
        marks = [*self.marks[index : index + 2], (len(self.written_text), len(text))]
        (_, shown_begin), (end, shown_end) = marks[:2]
        rest, shown = self.written_text[first:end], text[shown_begin:shown_end]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(rest), reversed(shown), strict=False))
        return shown_end - sum(1 for _ in alike)


class TextMark(NamedTuple):
    """An output at one moment."""

    output: _Output
    shown: _Window
    written: _Window
    marks: int
    written_text: str
    given: int
