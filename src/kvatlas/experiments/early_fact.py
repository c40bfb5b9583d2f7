"""Is a fact from the beginning still there when it is asked for at the end?

The study (arXiv:2604.05012, known here second-hand), contexts of 1K to 8K tokens and a kept fraction of 0.3, the fact
at the start of a chat and asked several turns later: full 94-96 %, InfiniGen 92-94 %, H2O 70-78 %, the gap widening
with context. Expected here: `full` answers all the model can; StreamingLLM has forgotten the fact whenever its window
is shorter than the context; H2O depends on whether the fact drew attention before it was asked; SnapKV finds it in one
prompt, where the question stands in its window, and loses it over turns. The limit is what a strategy knows when it
decides.

With more than one turn the context is a real session: equal parts, each answered with a few tokens, on one cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from kvatlas.core.errors import ConfigError
from kvatlas.experiments.asking import Conversation, ask, planted
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.kept_fraction import compared
from kvatlas.records.schema import Point, Sample
from kvatlas.workloads.recall import RecallPrompt

_REPLY_TOKENS = 4


class EarlyFact(Experiment):
    """Exact answers to a question about the first fact, against context length, turns and kept fraction."""

    name = "early_fact"
    question = "Is a fact from the beginning still there when it is asked for at the end?"
    role = "quality"
    own = frozenset({"context_tokens", "budgets", "turns", "num_keys", "num_prompts"})

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield for each context and number of turns the full cache, then all strategies fraction by fraction."""
        for context_tokens in sorted(settings.context_tokens):
            for turns in sorted(settings.turns):
                for strategy, budget in compared(settings.strategies, settings.budgets):
                    yield self.point(
                        model,
                        strategy,
                        context_tokens=context_tokens,
                        budget=budget,
                        turns=turns,
                        num_keys=settings.num_keys,
                        n=settings.num_prompts,
                    )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return 1 or 0 per prompt; equal indices are equal prompts under every strategy and fraction.

        Raises:
            ConfigError: the model has no tokenizer, or the turns do not fit into the context.
        """
        turns, context_tokens = int(point.params["turns"]), int(point.params["context_tokens"])
        prompts = planted(
            lab.model(point),
            num_keys=int(point.params["num_keys"]),
            context_tokens=context_tokens - (turns - 1) * _REPLY_TOKENS,
            fact_depth=0.0,
            n=int(point.params["n"]),
            seed=lab.settings.seed + context_tokens,
        )
        return ask(lab.engine(point), [in_turns(prompt, turns) for prompt in prompts], point.strategy)


def in_turns(prompt: RecallPrompt, turns: int) -> Conversation:
    """Return a prompt cut into turns of equal length: the fact opens the first one, the last one ends in the question.

    Raises:
        ConfigError: the prompt has too few tokens for so many turns.
    """
    length = len(prompt.prompt)
    if length < 16 * turns:
        raise ConfigError(f"{length} tokens are too few for {turns} turns; give more context_tokens or fewer turns")
    cuts = [round(turn * length / turns) for turn in range(turns + 1)]
    parts = tuple(prompt.prompt[start:end] for start, end in pairwise(cuts))
    return Conversation(turns=parts, answer=prompt.answer, reply_tokens=_REPLY_TOKENS)
