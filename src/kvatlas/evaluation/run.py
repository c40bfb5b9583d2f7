"""Run tasks of lm-eval under several strategies, and keep what became of each question in a records file.

The questions, prompts, choices and rules are lm-eval's; so are the names of the metrics. A question is kept as 0 or 1
under its number, so that strategies compare in pairs, on the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvatlas.core.errors import CapacityError, ConfigError, UnsupportedError
from kvatlas.core.units import parse_bytes, parse_tier_bytes
from kvatlas.engine.machine import accelerator_name, machine_params
from kvatlas.engine.memory import check_host_memory, check_kv_memory
from kvatlas.evaluation.tasks import lm_eval_version, load_tasks
from kvatlas.models.fast import LinearChoice, check_choice
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.models.precision import DType, resolve_dtype
from kvatlas.records.contents import model_params
from kvatlas.records.manifest import collect_manifest
from kvatlas.records.schema import Facts, Point, Sample
from kvatlas.records.store import RecordStore
from kvatlas.strategies.strategy import Strategy

EXPERIMENT = "evaluate"
TASKS = ("piqa", "hellaswag", "copa", "winogrande", "openbookqa", "boolq")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked, of whom, under what.

    Args:
        tasks: names of tasks or groups of lm-eval.
        strategies: what is compared.
        model: a folder, a hub id, or None for the bundled model.
        limit: most questions of each task, its first ones; None for all.
        fewshot: worked examples before each question; None for the task's own number.
        include: a folder of task definitions beside lm-eval's own; equal names replace those.
        held_back: last tokens of a question that are fed after the cut; 0 is what generation does.
        kv_memory: byte budget of the cache on the device.
        host_memory: byte budget on the host, for strategies that offload; "0": there is no such tier.
        max_batched_tokens: step token limit.
        dtype: of weights and activations.
        device: where the model runs.
        linear_weights: copies of weights for steps of few tokens on the CPU; see `kvatlas.models.loading.load_model`.
        seed: of the worked examples, and of the run.

    Raises:
        ConfigError: a strategy cannot be read, or a number is out of range.
    """

    tasks: tuple[str, ...] = TASKS
    strategies: tuple[str, ...] = ("full",)
    model: str | None = None
    limit: int | None = None
    fewshot: int | None = None
    include: Path | None = None
    held_back: int = 1
    kv_memory: str = "1GiB"
    host_memory: str = "1GiB"
    max_batched_tokens: int = 512
    dtype: DType = "auto"
    device: str = "cpu"
    linear_weights: LinearChoice = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for strategy in self.strategies:
            Strategy.parse(strategy)
        parse_bytes(self.kv_memory)
        parse_tier_bytes(self.host_memory)
        if not self.tasks or not self.strategies:
            raise ConfigError("nothing to evaluate; name at least one task, such as piqa, and one strategy")
        for name, least in (("limit", 1), ("fewshot", 0), ("held_back", 0), ("max_batched_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value} is out of range; write at least {least}")
        if self.include is not None and not self.include.is_dir():
            raise ConfigError(f"include folder {str(self.include)!r} does not exist; give one with task files (.yaml)")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one task went under one strategy.

    Args:
        task: its name.
        strategy: the sentence.
        status: "done" now, "found done" before, or "refused".
        text: the shares of right answers with their number, or the reason.
    """

    task: str
    strategy: str
    status: str
    text: str


def check_evaluation(evaluation: Evaluation) -> None:
    """Find out what could never run before a model is loaded or a file is made.

    Raises:
        UnsupportedError: lm-eval is not installed, or the device is absent.
        ConfigError: the dtype, device or way of keeping linear weights is unknown.
        CapacityError: the machine has less memory than ``kv_memory`` or ``host_memory``.
    """
    lm_eval_version()
    resolve_dtype(evaluation.dtype, evaluation.device)
    check_choice(evaluation.linear_weights)
    check_kv_memory(parse_bytes(evaluation.kv_memory), torch.device(evaluation.device))
    check_host_memory(parse_tier_bytes(evaluation.host_memory))


def evaluate(
    evaluation: Evaluation, store: RecordStore, command: str, say: Callable[[Outcome], object]
) -> list[Outcome]:
    """Ask every task under every strategy that the store does not have yet.

    Args:
        evaluation: what to ask.
        store: where each question's result goes; a point is written whole or not at all.
        command: the command line, for the manifest.
        say: called with each outcome as it comes.

    Raises:
        UnsupportedError: lm-eval is not installed, or a task's data cannot be had.
        UnknownNameError: a task does not exist.
        ConfigError: the model has no tokenizer, a task takes no worked examples but some are asked for, or it gives
            no number per question.
    """
    version = lm_eval_version()
    manager, tasks = load_tasks(evaluation.tasks, evaluation.include)
    fixed = [name for name, task in tasks.items() if task.get_config("num_fewshot") == 0]
    if evaluation.fewshot and fixed:
        raise ConfigError(
            f"fewshot={evaluation.fewshot} would do nothing for {', '.join(fixed)}, which take no worked examples; "
            "leave one of them out"
        )
    model = load_model(
        evaluation.model,
        dtype=evaluation.dtype,
        device=evaluation.device,
        linear_weights=evaluation.linear_weights,
    )
    device = accelerator_name(evaluation.device) or evaluation.device
    manifest = collect_manifest(command, evaluation.seed, device=device, models={model.name: _facts(model)})
    store.begin_run(manifest.model_copy(update={"versions": {**manifest.versions, "lm_eval": version}}))
    outcomes = []
    for name, task in tasks.items():
        for strategy in dict.fromkeys(str(Strategy.parse(strategy)) for strategy in evaluation.strategies):
            point = _point(evaluation, model, name, task, strategy)
            if store.is_done(point):
                outcome = Outcome(task=name, strategy=strategy, status="found done", text="measured before")
            else:
                outcome = _measure(evaluation, store, manager, model, point)
            say(outcome)
            outcomes.append(outcome)
    return outcomes


def question_samples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    """Yield one sample per question and metric, from the samples that lm-eval logs.

    Metrics keep lm-eval's names, such as ``acc``; where a task has several filters, all but "none" are named too.
    What is no plain number, such as a perplexity's parts, is left out.
    """
    for row in rows:
        for metric in row["metrics"]:
            value = row[metric]
            if isinstance(value, bool | int | float) or hasattr(value, "item"):
                number = float(value)
                name = metric if row.get("filter", "none") == "none" else f"{metric} ({row['filter']})"
                if math.isfinite(number):
                    yield Sample(metric=name, unit="", value=number, index=int(row["doc_id"]))


def _measure(evaluation: Evaluation, store: RecordStore, manager: Any, model: LoadedModel, point: Point) -> Outcome:
    """Ask one task under one strategy and write the point."""
    from lm_eval import simple_evaluate

    from kvatlas.evaluation.harness import KvatlasLM

    task = str(point.params["task"])
    try:
        judge = KvatlasLM(
            model,
            point.strategy,
            evaluation.kv_memory,
            held_back=evaluation.held_back,
            host_memory=evaluation.host_memory,
            max_batched_tokens=evaluation.max_batched_tokens,
        )
        results = simple_evaluate(
            model=judge,
            tasks=[task],
            task_manager=manager,
            num_fewshot=evaluation.fewshot,
            limit=evaluation.limit,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=evaluation.seed,
            numpy_random_seed=evaluation.seed,
            torch_random_seed=evaluation.seed,
            fewshot_random_seed=evaluation.seed,
        )
    except (CapacityError, UnsupportedError) as error:
        store.write_point(point, status="refused", reason=str(error))
        return Outcome(task=task, strategy=point.strategy, status="refused", text=str(error))
    samples = list(question_samples(results["samples"][task]))
    if not samples:
        raise ConfigError(f"task {task!r} gives no number per question, so nothing can be compared; choose another one")
    samples.append(Sample(metric="truncated", unit="questions", value=judge.num_truncated))
    store.write_point(point, samples)
    return Outcome(task=task, strategy=point.strategy, status="done", text=_shares(samples))


def _point(evaluation: Evaluation, model: LoadedModel, name: str, task: Any, strategy: str) -> Point:
    """Return the point of a task under a strategy, with everything that changes its samples."""
    fewshot = task.get_config("num_fewshot") if evaluation.fewshot is None else evaluation.fewshot
    questions = len(task.eval_docs)
    return Point(
        experiment=EXPERIMENT,
        model=model.name,
        model_role="quality",
        strategy=strategy,
        params={
            "task": name,
            "n": min(questions, evaluation.limit or questions),
            "fewshot": fewshot or 0,
            "held_back": evaluation.held_back,
            "dtype": evaluation.dtype,
            "device": evaluation.device,
            "linear_weights": evaluation.linear_weights,
            "threads": torch.get_num_threads(),
            "kv_memory_bytes": parse_bytes(evaluation.kv_memory),
            "host_memory_bytes": parse_tier_bytes(evaluation.host_memory),
            "max_batched_tokens": evaluation.max_batched_tokens,
            **machine_params(evaluation.device),
            **model_params(evaluation.model),
        },
    )


def _facts(model: LoadedModel) -> Facts:
    """Return what a manifest says of the model."""
    shape = model.adapter.shape
    return {
        "role": "quality",
        "parameters": shape.num_parameters,
        "layers": len(shape.layers),
        "dtype": str(model.adapter.dtype).removeprefix("torch."),
        **model.adapter.fast.describe(),
        "threads": torch.get_num_threads(),
    }


def _shares(samples: Sequence[Sample]) -> str:
    """Return ``"acc 0.71 (n = 100)"`` for each metric that is per question."""
    parts = []
    for metric in dict.fromkeys(sample.metric for sample in samples):
        values = [sample.value for sample in samples if sample.metric == metric]
        if metric == "truncated":
            parts += [f"{values[0]:.0f} prompts cut at their start"] if values[0] else []
        else:
            parts.append(f"{metric} {sum(values) / len(values):.3f} (n = {len(values)})")
    return ", ".join(parts)
