"""What experiments may use: models, engines with empty memory, and load runs that several of them share."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from kvatlas.core.errors import ConfigError
from kvatlas.core.units import parse_bytes
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.load import Arrival, Observation, drive, random_prompt
from kvatlas.experiments.settings import NO_LINK, Settings
from kvatlas.models.loading import LoadedModel, load_model, name_of
from kvatlas.models.precision import fastest_on_cpu
from kvatlas.records.schema import Facts, ModelRole, Point

LOAD_PARAMS = ("concurrency", "prompt_tokens", "output_tokens")
"""Params of a point that say which load it is."""

_WARM_TOKENS = 8
_LARGE_POOL = 2**30  # bytes


@dataclass
class Lab:
    """Loads models and makes a fresh engine per measurement.

    The models of the two roles stay; of all others one is held at a time, so that large ones never lie in memory
    together.

    Args:
        settings: of the study.
    """

    settings: Settings
    _kept: dict[str | None, LoadedModel] = field(default_factory=dict)
    _guest: dict[str | None, LoadedModel] = field(default_factory=dict)
    _sources: dict[str, str | None] = field(default_factory=dict)
    _runs: dict[tuple[object, ...], list[Observation]] = field(default_factory=dict)

    def name(self, source: str | None) -> str:
        """Return what points call a model, without loading it.

        Raises:
            CheckpointError: there is no such folder, and it is no hub id.
            ConfigError: two sources have one name.
        """
        name = name_of(source)
        if self._sources.setdefault(name, source) != source:
            raise ConfigError(
                f"{source!r} and {self._sources[name]!r} are both called {name!r} in records; rename a folder"
            )
        return name

    def _source(self, name: str) -> str | None:
        if name not in self._sources:
            for source in (self.settings.quality_model, self.settings.speed_model):
                self.name(source)
        return self._sources[name]

    def load(self, source: str | None) -> LoadedModel:
        """Return a model, loaded on first use; another one that no role needs is given up for it."""
        for held in (self._kept, self._guest):
            if source in held:
                return held[source]
        settings = self.settings
        stays = source in (settings.quality_model, settings.speed_model)
        if not stays:
            self._guest.clear()
            gc.collect()  # adapters and their models point at each other
        model = load_model(source, dtype=settings.dtype, device=settings.device, linear_weights=settings.linear_weights)
        (self._kept if stays else self._guest)[source] = model
        return model

    def model(self, point: Point) -> LoadedModel:
        """Return the model that a point is about."""
        return self.load(self._source(point.model))

    def llm(self, point: Point, *, kv_memory: str | int | None = None, link: str | None = None) -> LLM:
        """Return an engine with empty memory that has run a short request of the point's strategy to warm up.

        Args:
            point: whose model it runs.
            kv_memory: instead of the settings'.
            link: instead of the settings'.
        """
        settings = self.settings
        link = settings.link if link is None else link
        if parse_bytes(settings.kv_memory) >= _LARGE_POOL:
            gc.collect()  # the pool of the engine before is part of a cycle, and two may not fit
        llm = LLM(
            self.model(point),
            kv_memory=settings.kv_memory if kv_memory is None else kv_memory,
            max_batched_tokens=settings.max_batched_tokens,
            host_memory=settings.host_memory,
            link=None if link == NO_LINK else link,
            isolate_failures=False,
        )
        llm.generate(
            [list(range(_WARM_TOKENS))], SamplingParams(max_tokens=2, ignore_eos=True), strategy=point.strategy
        )
        return llm

    def engine(self, point: Point, *, kv_memory: str | int | None = None, link: str | None = None) -> Engine:
        """Return the engine alone; see `llm`."""
        return self.llm(point, kv_memory=kv_memory, link=link).engine

    def repeats(self) -> Iterator[int]:
        """Yield 0, 1, ... as often as a timed point is to be measured, fewer times where it takes long."""
        start = time.perf_counter()
        for repeat in range(self.settings.repeats):
            if repeat and time.perf_counter() - start >= self.settings.repeat_limit_s:
                return
            yield repeat

    def load_arrivals(self, point: Point, repeat: int, engine: Engine) -> list[Arrival]:
        """Return the requests of a repeat, which all arrive at once: the same under every strategy."""
        rng = random.Random(self.settings.seed + repeat)
        concurrency, prompt_tokens, output_tokens = (int(point.params[name]) for name in LOAD_PARAMS)
        vocabulary = engine.store.lanes.shape.vocab_size
        return [
            Arrival(
                at_s=0.0,
                prompt_ids=random_prompt(rng, vocabulary, prompt_tokens),
                output_tokens=output_tokens,
            )
            for _ in range(concurrency)
        ]

    def load_runs(self, point: Point) -> list[Observation]:
        """Return what each repeat of a load showed; the experiments that ask for the same load share the runs.

        Args:
            point: its params name concurrency, prompt_tokens, output_tokens and kv_memory_bytes.
        """
        pool = int(point.params["kv_memory_bytes"])
        key = (point.model, point.strategy, pool, *(point.params[name] for name in LOAD_PARAMS))
        if key not in self._runs:
            runs = []
            for repeat in self.repeats():
                engine = self.engine(point, kv_memory=pool)
                runs.append(drive(engine, self.load_arrivals(point, repeat, engine), point.strategy))
            self._runs[key] = runs
        return self._runs[key]

    def facts(self, point_model: str, role: ModelRole) -> Facts:
        """Return what a manifest says of a model, by its name in points."""
        model = self.load(self._source(point_model))
        shape = model.adapter.shape
        layer = shape.layers[0]
        return {
            "role": role,
            "parameters": shape.num_parameters,
            "layers": len(shape.layers),
            "query_heads": layer.num_query_heads,
            "kv_heads": layer.num_kv_heads,
            "head_dim": layer.key_dim,
            "dtype": str(model.adapter.dtype).removeprefix("torch."),
            "dtype_auto": str(fastest_on_cpu()) if model.adapter.device.type == "cpu" else "the checkpoint's own",
            **model.adapter.fast.describe(),
            "threads": torch.get_num_threads(),
        }
