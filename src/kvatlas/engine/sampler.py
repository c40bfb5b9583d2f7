"""Choose the next token of each request from its logits, or score one that was decided beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq

import torch
from torch import Tensor

from kvatlas.engine.request import ForcedOutput, Request
from kvatlas.kernels.sampling import draw

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
    greedy, drawn = _most_likely(logits_BV), _draw(logits_BV, requests)
    tokens: list[int | Exception] = []
    for row, request in enumerate(requests):
        try:
            forced = request.forced
            scored = None if forced is None else _score(logits_BV[row], forced, greedy=greedy[row])
            tokens.append(drawn.get(row, greedy[row]) if scored is None else scored)
        except Exception as error:
            tokens.append(error)
    return tokens


def _draw(logits_BV: Tensor, requests: Seq[Request]) -> dict[int, int | Exception]:
    """Return a token, by rows, for those that draw one at their temperature among their top-k and top-p tokens."""
    rows = [row for row, each in enumerate(requests) if each.forced is None and each.params.temperature > 0]
    if not rows:
        return {}
    params = [requests[row].params for row in rows]
    uniform = [torch.rand((), dtype=torch.float64, generator=requests[row].generator) for row in rows]
    tokens = draw(
        logits_BV if len(rows) == len(requests) else logits_BV[rows],
        torch.tensor([each.temperature for each in params], dtype=torch.float32),
        torch.tensor([each.top_k for each in params], dtype=torch.int64),
        torch.tensor([each.top_p for each in params], dtype=torch.float64),
        torch.stack(uniform),
    ).tolist()
    nothing = ValueError("no token can be drawn: the model's logits are not numbers, or all of them are minus infinity")
    return {row: nothing if token < 0 else token for row, token in zip(rows, tokens, strict=True)}


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
