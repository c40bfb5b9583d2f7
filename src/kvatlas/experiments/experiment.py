"""What an experiment is, and what it may use."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvatlas.core.errors import ConfigError
from kvatlas.core.units import parse_bytes
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.models.loading import DType, LoadedModel, load_model
from kvatlas.records.schema import Facts, ModelRole, Point, Sample
from kvatlas.strategies.strategy import Strategy

_COUNTS = (
    "max_batched_tokens",
    "repeats",
    "prompt_tokens",
    "concurrency",
    "concurrency_prompt_tokens",
    "concurrency_output_tokens",
    "context_tokens",
    "num_keys",
    "num_prompts",
    "trace_requests",
    "trace_max_prompt_tokens",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a sweep can be told; presets fill it, flags override.

    Args:
        strategies: what is compared.
        quality_model: model whose answers are judged; None for the bundled one.
        speed_model: model whose time and memory are measured.
        dtype: of weights and activations.
        device: where models run.
        kv_memory: byte budget of each engine.
        max_batched_tokens: step token limit.
        seed: of prompts and of sampling.
        repeats: how often a timed point is measured.
        prompt_tokens: prompt lengths of ``prompt_length``.
        concurrency: numbers of requests of ``concurrency``.
        concurrency_prompt_tokens: their prompt length.
        concurrency_output_tokens: their output length.
        context_tokens: context lengths of ``early_fact``.
        budgets: kept fractions of ``early_fact``.
        num_keys: facts per context of ``early_fact``.
        num_prompts: prompts per point of ``early_fact``.
        traces: excerpts or files of ``trace_replay``.
        trace_requests: requests taken of each.
        trace_time_scale: factor on arrival times.
        trace_length_scale: factor on lengths.
        trace_max_prompt_tokens: longer prompts are cut.
        slo_ttft_s: limit of goodput on TTFT.
        slo_tpot_s: limit of goodput on TPOT.

    Raises:
        ConfigError: a strategy cannot be read, or a number is out of range.
    """

    strategies: tuple[str, ...] = ("full", "streaming_llm(sinks=4, recent=0.2)", "h2o(heavy=0.1, recent=0.1)")
    quality_model: str | None = None
    speed_model: str = "random:llama-mini"
    dtype: DType = "auto"
    device: str = "cpu"
    kv_memory: str = "1GiB"
    max_batched_tokens: int = 512
    seed: int = 0
    repeats: int = 3
    prompt_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    concurrency_prompt_tokens: int = 1024
    concurrency_output_tokens: int = 32
    context_tokens: tuple[int, ...] = (512, 1024, 2048)
    budgets: tuple[float, ...] = (0.5, 0.2, 0.1)
    num_keys: int = 1
    num_prompts: int = 400
    traces: tuple[str, ...] = ("azure-conv", "mooncake-conversation")
    trace_requests: int = 64
    trace_time_scale: float = 0.1
    trace_length_scale: float = 0.25
    trace_max_prompt_tokens: int = 4096
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.1

    def __post_init__(self) -> None:
        for strategy in self.strategies:
            Strategy.parse(strategy)
        parse_bytes(self.kv_memory)
        for name in _COUNTS:
            self._check(name, lambda value: value >= 1, "at least 1")
        self._check("seed", lambda value: 0 <= value < 2**63, "0 or more, below 2**63")
        self._check("budgets", lambda value: 0 < value <= 1, "fractions in (0, 1], such as 0.2")
        self._check("trace_time_scale", lambda value: 0 <= value < math.inf, "a finite factor of at least 0")
        for name in ("trace_length_scale", "slo_ttft_s", "slo_tpot_s"):
            self._check(name, lambda value: 0 < value < math.inf, "a finite number above 0")

    def _check(self, name: str, good: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, name)
        if not all(good(one) for one in (value if isinstance(value, tuple) else (value,))):
            raise ConfigError(f"{name}={value} is out of range; write {wanted}")


@dataclass
class Lab:
    """Loads each model once and makes a fresh engine per measurement."""

    settings: Settings
    _models: dict[str, LoadedModel] = field(default_factory=dict)

    def model(self, role: ModelRole) -> LoadedModel:
        """Return the model of a role, loaded on first use."""
        source = self.settings.quality_model if role == "quality" else self.settings.speed_model
        key = str(source)
        if key not in self._models:
            self._models[key] = load_model(source, dtype=self.settings.dtype, device=self.settings.device)
        return self._models[key]

    def engine(self, role: ModelRole, kv_memory: str | int | None = None) -> Engine:
        """Return an engine with empty memory."""
        return LLM(
            self.model(role),
            kv_memory=self.settings.kv_memory if kv_memory is None else kv_memory,
            max_batched_tokens=self.settings.max_batched_tokens,
        ).engine

    def facts(self, role: ModelRole) -> tuple[str, Facts]:
        """Return a model's name and what a manifest says of it."""
        model = self.model(role)
        shape = model.adapter.shape
        layer = shape.layers[0]
        return model.name, {
            "role": role,
            "parameters": shape.num_parameters,
            "layers": len(shape.layers),
            "query_heads": layer.num_query_heads,
            "kv_heads": layer.num_kv_heads,
            "head_dim": layer.key_dim,
            "dtype": str(model.adapter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }


class Experiment(ABC):
    """One question."""

    name: ClassVar[str]
    question: ClassVar[str]
    role: ClassVar[ModelRole]

    def check(self, settings: Settings) -> None:
        """Raise a KvatlasError for settings that could not be measured, before anything is."""
        return

    @abstractmethod
    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield the settings to measure, for a model of this name."""

    @abstractmethod
    def measure(self, point: Point, lab: Lab) -> list[Sample]:
        """Return the raw numbers of one point."""

    def point(self, model: str, strategy: str, **params: int | float | str) -> Point:
        """Return a point of this experiment; the strategy is written in full."""
        return Point(
            experiment=self.name,
            model=model,
            model_role=self.role,
            strategy=str(Strategy.parse(strategy)),
            params=dict(params),
        )
