"""Cut long texts into windows that a model can take, so that every token is scored in known surroundings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence as Seq
from dataclasses import dataclass

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.core.vocabulary import Axis
from kvatlas.engine.engine import Engine
from kvatlas.engine.scoring import ScoreJob, score
from kvatlas.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What the model thought of one text.

    Args:
        num_tokens: tokens that were scored; 0 for a text that is too short.
        logprob: sum of their natural log-probabilities.
    """

    num_tokens: int
    logprob: float


def rolling_jobs(tokens: Seq[int], *, prefix_token: int, longest: int, context_tokens: int = 1) -> list[ScoreJob]:
    """Return windows that score every token of a text once, the first one after ``prefix_token``.

    The first window has the prefix alone as its context. Each later one has ``context_tokens`` tokens of the text as
    its context; the last one more, so that it is as long as the others.

    Args:
        tokens: token ids of the text.
        prefix_token: stands before the text, such as the beginning-of-text token.
        longest: most tokens of a window, context included; at least 2.
        context_tokens: tokens of context of all windows but the first, below ``longest``.

    Raises:
        ConfigError: a length is out of range.
    """
    if not 1 <= context_tokens < longest:
        raise ConfigError(f"context_tokens is {context_tokens} in windows of {longest}; want 1 to {longest - 1}")
    done = min(len(tokens), longest - 1)
    jobs = [ScoreJob(context=(prefix_token,), continuation=tuple(tokens[:done]))] if done else []
    while done < len(tokens):
        end = min(len(tokens), done + longest - context_tokens)
        jobs.append(ScoreJob(context=tuple(tokens[max(0, end - longest) : done]), continuation=tuple(tokens[done:end])))
        done = end
    return jobs


def after_context_jobs(tokens: Seq[int], *, context_tokens: int, stride: int) -> list[ScoreJob]:
    """Return windows that score each token from position ``context_tokens`` on once, a ``stride`` of them per window.

    Every window has exactly ``context_tokens`` tokens of context, so that fractions of the prompt mean the same in
    all; a text that is not longer gives none.

    Raises:
        ConfigError: a length is below 1.
    """
    if context_tokens < 1 or stride < 1:
        raise ConfigError(f"context_tokens and stride are {context_tokens} and {stride}; want at least 1 each")
    return [
        ScoreJob(context=tuple(tokens[at - context_tokens : at]), continuation=tuple(tokens[at : at + stride]))
        for at in range(context_tokens, len(tokens), stride)
    ]


def score_texts(
    engine: Engine, texts: Iterable[Seq[int]], strategy: str | Strategy, *, context_tokens: int, stride: int
) -> list[TextScore]:
    """Return the score of each text after its first ``context_tokens`` tokens.

    The strategy cuts each window's context; the ``stride`` tokens after it are decode steps on what is left.
    `perplexity` turns the scores into one number.

    Raises:
        ConfigError: a length is below 1.
        CapacityError: a window can never fit.
    """
    windows = [after_context_jobs(text, context_tokens=context_tokens, stride=stride) for text in texts]
    scores = iter(score(engine, [job for jobs in windows for job in jobs], strategy))
    found = []
    for jobs in windows:
        mine = [next(scores) for _ in jobs]
        found.append(
            TextScore(num_tokens=sum(len(one.logprobs) for one in mine), logprob=sum(one.logprob for one in mine))
        )
    return found


def perplexity(scores: Iterable[TextScore]) -> float:
    """Return exp of the mean negative log-probability per token, over all texts.

    Raises:
        ConfigError: no token was scored.
    """
    known = list(scores)
    tokens = sum(one.num_tokens for one in known)
    if not tokens:
        raise ConfigError("no token was scored: every text is as short as its context; lower context_tokens")
    return math.exp(-sum(one.logprob for one in known) / tokens)


def refuse_fractions(strategy: Strategy) -> None:
    """Refuse a strategy whose budget is a share of the prompt, where the prompt is a single token.

    Raises:
        UnsupportedError: with the parameter and what to write instead.
    """
    pairs = [(keep, field) for keep in strategy.on(Axis.KEEP) for field in keep.parameters()]
    for keep, field in pairs:
        value = getattr(keep, field.name)
        if isinstance(value, float):
            raise UnsupportedError(
                f"{strategy} keeps {field.name}={value} of the prompt, but the rolling log-likelihood of a text begins "
                f"with a prompt of one token; write a number of tokens, such as {keep.name}({field.name}=128)"
            )
