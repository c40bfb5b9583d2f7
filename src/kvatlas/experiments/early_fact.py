"""Is a fact from the beginning of the context still there when it is asked for at the end?

The study (arXiv:2604.05012, known here second-hand) found full 94-96 %, H2O 70-78 % at a kept fraction of 0.3, the
gap widening with context. Expected here: `full` answers all the model can; StreamingLLM has forgotten the fact
whenever its window is shorter than the context; H2O depends on whether the fact drew attention before it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvatlas.core.errors import ConfigError
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.experiments.experiment import Experiment, Lab, Settings
from kvatlas.models.loading import LoadedModel
from kvatlas.records.schema import Point, Sample
from kvatlas.strategies.strategy import Strategy
from kvatlas.workloads.recall import RecallTask, make_recall_prompts, read_filler


class EarlyFact(Experiment):
    """Exact answers to a question about the first fact, against context length and kept fraction."""

    name = "early_fact"
    question = "Is a fact from the beginning of the context still there when it is asked for at the end?"
    role = "quality"

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield `full` once per context, and each other strategy at each kept fraction."""
        strategies = dict.fromkeys(Strategy.parse(strategy) for strategy in settings.strategies)
        named = {(strategy.keep.name, *map(str, strategy.stages[1:])) for strategy in strategies}
        for context_tokens in settings.context_tokens:
            for name, *others in sorted(named, key=lambda stages: (stages[0] != "full", stages)):
                for budget in (1.0,) if name == "full" else settings.budgets:
                    yield self.point(
                        model,
                        " | ".join([at_budget(name, budget), *others]),
                        context_tokens=context_tokens,
                        budget=budget,
                        num_keys=settings.num_keys,
                        n=settings.num_prompts,
                    )

    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return 1 or 0 per prompt; equal indices are equal prompts under every strategy."""
        model, engine = lab.model("quality"), lab.engine("quality")
        task = RecallTask(
            num_keys=int(point.params["num_keys"]), context_tokens=int(point.params["context_tokens"]), fact_depth=0.0
        )
        prompts = make_recall_prompts(
            task, encoder(model), read_filler(), int(point.params["n"]), seed=lab.settings.seed + task.context_tokens
        )
        requests = [
            engine.add_request(
                prompt.prompt, SamplingParams(max_tokens=len(prompt.answer), ignore_eos=True), point.strategy
            )
            for prompt in prompts
        ]
        held = _run(engine, requests[0])
        samples = [Sample(metric="kv_after_prefill", unit="bytes", value=held)]
        for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            correct = float(tuple(request.output_ids) == prompt.answer)
            samples.append(Sample(metric="correct", unit="", value=correct, index=index))
        return samples


def at_budget(name: str, budget: float) -> str:
    """Return the sentence of a keep stage that holds about ``budget`` of the prompt, half of it recent for H2O.

    Raises:
        ConfigError: the stage takes no such share; compose the sentence by hand.
    """
    half = round(budget / 2, 6)
    sentences = {
        "full": "full",
        "h2o": f"h2o(heavy={half}, recent={half})",
        "snapkv": f"snapkv(budget={budget}, window=16)",
        "streaming_llm": f"streaming_llm(sinks=4, recent={budget})",
    }
    if name not in sentences:
        raise ConfigError(f"early_fact cannot set the kept fraction of {name!r}; it knows {', '.join(sentences)}")
    return sentences[name]


def encoder(model: LoadedModel) -> Callable[[str], list[int]]:
    """Return text -> token ids without special tokens.

    Raises:
        ConfigError: the model has no tokenizer, so it cannot be asked anything.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{model.name} has no tokenizer; early_fact asks questions in text, choose another model")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


def _run(engine: Engine, first: Request) -> int:
    """Run everything and return the KV bytes that the first request held when its prompt was done."""
    held = 0
    while engine.has_work:
        engine.step()
        if not held and first.seq is not None and first.token_times_s:
            held = engine.store.kv_bytes(first.seq)
    return held
