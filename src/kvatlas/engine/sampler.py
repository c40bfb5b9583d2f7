"""Choose the next token of each request from its logits, or score one that was decided beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq

import torch
from torch import Tensor

from kvatlas.engine.request import ForcedOutput, Request

Sampler = Callable[[Tensor, Seq[Request], frozenset[int]], Seq[int | Exception]]
"""What chooses tokens for an engine, called as `sample` is and answering as it does."""


def sample(logits_BV: Tensor, requests: Seq[Request], end_ids: frozenset[int]) -> list[int | Exception]:
    """Return one token id per row, or why there is none for it: one row's failure is its own.

    Args:
        logits_BV: [B, V], one row per request; changed in place.
        requests: whose parameters and generators apply.
        end_ids: the model's end tokens, forbidden before ``min_tokens``.
    """
    logits_BV = logits_BV.float()
    for row, request in enumerate(requests):
        params = request.params
        if len(request.output_ids) < params.min_tokens:
            logits_BV[row, sorted(end_ids | set(params.stop_token_ids))] = -torch.inf
    tokens: list[int | Exception] = []
    for row, (request, greedy) in enumerate(zip(requests, _most_likely(logits_BV), strict=True)):
        try:
            tokens.append(_choose(logits_BV[row], request, greedy))
        except Exception as error:
            tokens.append(error)
    return tokens


def _choose(logits_V: Tensor, request: Request, greedy: int) -> int:
    """Return the next token of one request, whose most likely one is ``greedy``."""
    if request.forced is not None:
        return _score(logits_V, request.forced, greedy=greedy)
    if request.params.temperature > 0:
        return _draw(logits_V, request)
    return greedy


def _most_likely(logits_BV: Tensor) -> list[int]:
    """Return the most likely token of each row."""
    on_cpu = logits_BV.device.type == "cpu"
    best = logits_BV.numpy() if on_cpu else logits_BV  # numpy's search is ten times as fast as torch's on the CPU
    tokens: list[int] = best.argmax(-1).tolist()
    return tokens


def _score(logits_V: Tensor, forced: ForcedOutput, *, greedy: int) -> int:
    """Return the decided token, after noting its log-probability and whether it is the most likely one."""
    token = forced.tokens[len(forced.logprobs)]
    forced.logprobs.append(float(logits_V.log_softmax(dim=-1)[token]))
    forced.greedy.append(token == greedy)
    return token


def _draw(logits_V: Tensor, request: Request) -> int:
    """Return a token drawn at the request's temperature among its top-k and top-p tokens."""
    params = request.params
    values, order = logits_V.sort(descending=True)
    values = (values - values[0]) / params.temperature  # a tiny temperature must not overflow
    if params.top_k:
        values[params.top_k :] = -torch.inf
    probabilities = values.softmax(dim=-1)
    if params.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    choice = torch.multinomial(probabilities.cpu(), 1, generator=request.generator)
    return int(order[int(choice)])
