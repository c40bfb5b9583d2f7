"""How many answers are still right when only a fraction of the cache is kept?

The study (arXiv:2604.05012, known here second-hand), on six multiple-choice tasks with an 8B model: at a kept fraction
of 0.5 H2O and InfiniGen equal the full cache; at 0.1 InfiniGen loses 6 points on average and H2O up to 23, depending on
the task; at 0.02 to 0.04 both near chance. Here the tasks are facts planted at random depth, one or sixteen, of which
one is asked. Expected: strategies that drop tokens before the question is known lose the fact with the tokens; those
that see the question (SnapKV's window) or drop nothing (InfiniGen) hold longer; sixteen facts leave fewer tokens for
each. The limit is what a strategy knows when it decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvatlas.core.errors import ConfigError
from kvatlas.experiments.asking import Conversation, ask, planted
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.experiments.kept_fraction import compared
from kvatlas.records.schema import Point, Sample
from kvatlas.workloads.recall import NAMES

_KEYS = re.compile(r"(\d+) keys")


class AccuracyBudget(Experiment):
    """Exact answers about planted facts, against the kept fraction."""

    name = "accuracy_budget"
    question = "How many answers are still right when only a fraction of the cache is kept?"
    role = "quality"
    own = frozenset({"accuracy_tasks", "accuracy_context_tokens", "accuracy_budgets", "num_prompts"})

    def check(self, settings: Settings) -> None:
        """Read the tasks.

        Raises:
            ConfigError: one is unknown.
        """
        for task in settings.accuracy_tasks:
            keys_of(task)

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield for each context and task the full cache, then all strategies fraction by fraction."""
        for context_tokens in sorted(settings.accuracy_context_tokens):
            for task in settings.accuracy_tasks:
                for strategy, budget in compared(settings.strategies, settings.accuracy_budgets):
                    yield self.point(
                        model,
                        strategy,
                        budget=budget,
                        task=task,
                        context_tokens=context_tokens,
                        n=settings.num_prompts,
                    )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return 1 or 0 per prompt; equal indices are equal prompts under every strategy and fraction.

        Raises:
            ConfigError: the model has no tokenizer, or the facts do not fit into the context.
        """
        context_tokens = int(point.params["context_tokens"])
        prompts = planted(
            lab.model(point),
            num_keys=keys_of(str(point.params["task"])),
            context_tokens=context_tokens,
            fact_depth=None,
            n=int(point.params["n"]),
            seed=lab.settings.seed + context_tokens,
        )
        conversations = [Conversation(turns=(prompt.prompt,), answer=prompt.answer) for prompt in prompts]
        return ask(lab.engine(point), conversations, point.strategy)


def keys_of(task: str) -> int:
    """Return how many facts a task plants: 1 for "single needle", N for "N keys".

    Raises:
        ConfigError: the task is unknown.
    """
    if task == "single needle":
        return 1
    match = _KEYS.fullmatch(task)
    if match is None or not 1 <= int(match[1]) <= len(NAMES):
        raise ConfigError(f"unknown task {task!r}; write 'single needle', or '16 keys' (1 to {len(NAMES)})")
    return int(match[1])
