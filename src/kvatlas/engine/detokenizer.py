"""Text from tokens as they come, and the end of a text at a stop string."""

from __future__ import annotations

from typing import Any

from kvatlas.engine.request import Request


class Detokenizer:
    """Extends each request's text by the token appended last.

    Args:
        tokenizer: a tokenizer of transformers, or None where prompts and outputs are token ids only.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._marks: dict[Request, tuple[int, int]] = {}
        self._given: dict[Request, int] = {}  # characters given out

    def advance(self, request: Request) -> bool:
        """Extend the text by the newest token; return whether a stop string has ended it.

        A token may complete a character that the ones before it began; the text grows by whole characters.
        """
        if self._tokenizer is None:
            return False
        ids = request.output_ids
        begin, shown = self._marks.get(request, (0, 0)) if len(ids) > 1 else (0, 0)
        before = self._tokenizer.decode(ids[begin:shown], skip_special_tokens=True)
        after = self._tokenizer.decode(ids[begin:], skip_special_tokens=True)
        if after.endswith("\N{REPLACEMENT CHARACTER}") and len(ids) < request.params.max_tokens:
            self._marks[request] = (begin, shown)
            return False
        self._marks[request] = (shown, len(ids))
        known = len(request.text)
        request.text += after[len(before) :]
        return len(ids) >= request.params.min_tokens and self._stop(request, known)

    def take(self, request: Request) -> str:
        """Return the text to give out now: all of it at the end, before that what no stop string can cut any more."""
        held = 0 if request.finish_reason else max(map(len, request.params.stop), default=1) - 1
        given = self._given.get(request, 0)
        until = max(given, len(request.text) - held)
        self._given[request] = until
        return request.text[given:until]

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request that has ended."""
        self._marks.pop(request, None)
        self._given.pop(request, None)

    @staticmethod
    def _stop(request: Request, known: int) -> bool:
        """Cut the text at the first stop string; it may have begun in text that was known before."""
        starts = (request.text.find(stop, max(0, known - len(stop) + 1)) for stop in request.params.stop)
        first = min((start for start in starts if start >= 0), default=None)
        if first is not None:
            request.text = request.text[:first]
        return first is not None
