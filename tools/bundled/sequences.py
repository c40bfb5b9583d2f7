"""Training sequences: filler with many planted facts, and a question about every one of them.

The prompt format is that of ``kvatlas.workloads.recall``; names, values and places are drawn afresh, so none
can be learnt by heart. Shapes: B sequences, T tokens, Q questions over the whole batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvatlas.workloads.recall import NAMES, VALUE_DIGITS, Encode, fact_text, question_text, value_text

FILLER, FACT, QUESTION = 0, 1, 2
MAX_BREAKS = 6


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the curriculum.

    Args:
        tokens: sequence length T.
        batch: sequences per step B.
        steps: optimizer steps.
        max_span: position ids of a jumping sequence end at most here, in tokens.
    """

    tokens: int
    batch: int
    steps: int
    max_span: int


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Token ids and what is asked about them.

    Args:
        tokens: ids [B, T].
        positions: RoPE positions [B, T], increasing, with gaps inside filler.
        is_filler: [B, T], true where a token is ordinary text.
        last_prompt: index [Q] into the flattened [B * T] tokens of each question's last token.
        answers: value token ids [Q, VALUE_DIGITS].
    """

    tokens: Tensor
    positions: Tensor
    is_filler: Tensor
    last_prompt: Tensor
    answers: Tensor


class SequenceMaker:
    """Draws training batches from tokenized text."""

    def __init__(self, encode: Encode, text_tokens: NDArray[np.int64]) -> None:
        """Keep the text and the token ids of names, digits and question.

        Args:
            encode: text to token ids, without special tokens.
            text_tokens: the training text as token ids, one dimension.
        """
        self._text = text_tokens
        self._names = [encode(f" {name}")[0] for name in NAMES]
        self._digits = [encode(f" {digit}")[0] for digit in range(10)]
        self._question_start = encode(question_text(NAMES[0]))[:-1]
        self._fact_end = encode(fact_text(NAMES[0], 0))[1 + VALUE_DIGITS :]
        assert len(encode(value_text(0))) == VALUE_DIGITS, "a digit must be one token"

    def batch(self, stage: Stage, rng: np.random.Generator) -> TrainingBatch:
        """Return a batch of ``stage.batch`` sequences of ``stage.tokens`` tokens."""
        tokens, kinds, positions, last_prompt, answers = [], [], [], [], []
        for row in range(stage.batch):
            row_tokens, row_kinds, row_questions = self._sequence(stage.tokens, rng)
            tokens.append(row_tokens)
            kinds.append(row_kinds)
            positions.append(_draw_positions(row_kinds, stage.max_span, rng))
            last_prompt += [row * stage.tokens + index for index in row_questions]
            answers += [row_tokens[index + 1 : index + 1 + VALUE_DIGITS] for index in row_questions]
        return TrainingBatch(
            tokens=torch.from_numpy(np.stack(tokens)),
            positions=torch.from_numpy(np.stack(positions)),
            is_filler=torch.from_numpy(np.stack(kinds) == FILLER),
            last_prompt=torch.tensor(last_prompt),
            answers=torch.from_numpy(np.stack(answers)),
        )

    def _sequence(
        self, num_tokens: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """Return token ids [T], their kinds [T], and the index of each question's last token."""
        facts, questions = self._draw_pairs(num_tokens, rng)
        num_filler = num_tokens - sum(map(len, facts)) - sum(map(len, questions))
        start = rng.integers(len(self._text) - num_filler)
        filler = self._text[start : start + num_filler]
        pieces, kinds, asked_at, used, length = [], [], [], 0, 0
        for place, kind, index in _draw_order(len(facts), num_filler, rng):
            pieces += [filler[used:place], (facts if kind == FACT else questions)[index]]
            kinds += [np.full(place - used, FILLER), np.full(len(pieces[-1]), kind)]
            length += place - used + len(pieces[-1])
            used = place
            if kind == QUESTION:
                asked_at.append(length - VALUE_DIGITS - 1)
        tokens = np.concatenate([*pieces, filler[used:]])
        return tokens, np.concatenate([*kinds, np.full(num_filler - used, FILLER)]), asked_at

    def _draw_pairs(
        self, num_tokens: int, rng: np.random.Generator
    ) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Return facts and their answered questions as token ids; few or many of them, log-uniformly."""
        pair_tokens = 2 * (1 + VALUE_DIGITS) + len(self._fact_end) + len(self._question_start)
        most = min(len(NAMES), int(0.8 * num_tokens / pair_tokens))
        num_pairs = int(np.exp(rng.uniform(np.log(2), np.log(most + 1))))
        facts, questions = [], []
        for name in rng.choice(self._names, num_pairs, replace=False):
            said = [name, *rng.choice(self._digits, VALUE_DIGITS)]
            facts.append(np.array([*said, *self._fact_end]))
            questions.append(np.array([*self._question_start, *said]))
        return facts, questions


def _draw_order(num_pairs: int, num_filler: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Return (filler tokens before it, kind, pair index) in order; each question comes after its fact.

    Half of the questions stand at the very end, the others anywhere behind their fact.
    """
    items = []
    for index in range(num_pairs):
        fact_place = int(rng.integers(num_filler + 1))
        at_end = rng.random() < 0.5
        question_place = num_filler if at_end else int(rng.integers(fact_place, num_filler + 1))
        items += [(fact_place, FACT, rng.random(), index), (question_place, QUESTION, rng.random(), index)]
    return [(place, kind, index) for place, kind, _, index in sorted(items)]


def _draw_positions(kinds: NDArray[np.int64], max_span: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return positions [T]; in 60 % of the sequences they jump, so that short ones hold far distances."""
    num_tokens = len(kinds)
    steps = np.ones(num_tokens, dtype=np.int64)
    steps[0] = 0
    inside_filler = np.flatnonzero((kinds[1:] == FILLER) & (kinds[:-1] == FILLER)) + 1
    if max_span > num_tokens and len(inside_filler) and rng.random() < 0.6:
        breaks = rng.choice(inside_filler, rng.integers(1, MAX_BREAKS + 1))
        slack = rng.integers(max_span - num_tokens + 1)
        np.add.at(steps, breaks, rng.multinomial(slack, np.full(len(breaks), 1 / len(breaks))))
    return np.cumsum(steps)
