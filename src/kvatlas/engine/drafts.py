"""What a request was before its next token was chosen: a token is given whole, or not at all."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvatlas.engine.detokenizer import Detokenizer, TextMark
from kvatlas.engine.request import Request


@dataclass(slots=True)
class Draft:
    """One request whose next token is being chosen.

    A step may break off anywhere in between, by Ctrl-C above all. What it has changed by then, random numbers drawn
    included, is taken back, so that the token comes out the same when the step is made again.

    Args:
        request: who.
        detokenizer: what its text is made with.
        accepted: whether it has got the token, so that there is nothing to take back.
    """

    request: Request
    detokenizer: Detokenizer
    accepted: bool = False
    _tokens: int = field(init=False)
    _times: int = field(init=False)
    _unread: int = field(init=False)
    _scored: int = field(init=False)
    _text: str = field(init=False)
    _random: Tensor | None = field(init=False)
    _mark: TextMark | None = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self._tokens, self._times, self._text = len(request.tokens), len(request.token_times_s), request.text
        self._unread = 0 if request.unread is None else len(request.unread)
        self._scored = 0 if request.forced is None else len(request.forced.logprobs)
        self._random = None if request.generator is None else request.generator.get_state()
        self._mark = self.detokenizer.mark(request)

    def undo(self) -> None:
        """Make the request what it was, unless it has got its token or has ended."""
        request = self.request
        if self.accepted or request.finish_reason is not None:
            return
        del request.tokens[self._tokens :], request.token_times_s[self._times :]
        request.text = self._text
        while request.unread is not None and len(request.unread) > self._unread:
            request.unread.pop()
        if request.forced is not None:
            del request.forced.logprobs[self._scored :], request.forced.greedy[self._scored :]
        if request.generator is not None and self._random is not None:
            request.generator.set_state(self._random)
        self.detokenizer.restore(request, self._mark)
