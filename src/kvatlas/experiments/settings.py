"""What a study can be told: one value per question that an experiment leaves open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from kvatlas.core.errors import ConfigError
from kvatlas.core.units import parse_bytes, parse_tier_bytes
from kvatlas.models.fast import LinearChoice, check_choice
from kvatlas.models.precision import DType
from kvatlas.storage.link import LinkRate
from kvatlas.strategies.strategy import Strategy

NO_LINK = "none"

_MOST = 10**7  # tokens, requests or repeats: more would fill memory before anything could refuse them
_COUNTS = (
    *("max_batched_tokens", "repeats", "prompt_tokens", "breakdown_prompt_tokens"),
    *("concurrency", "concurrency_prompt_tokens", "concurrency_output_tokens", "pool_tries"),
    *("output_prompt_tokens", "accuracy_context_tokens", "context_tokens", "turns", "num_keys", "num_prompts"),
    *("rate_requests", "rate_prompt_tokens", "rate_output_tokens"),
    *("model_prompt_tokens", "model_batch"),
    *("trace_requests", "trace_max_prompt_tokens"),
)
_DECODING = ("output_tokens", "breakdown_output_tokens", "model_output_tokens")
_BUDGETS = ("budgets", "accuracy_budgets")
_POSITIVE = ("rates", "trace_length_scale", "slo_ttft_s", "slo_tpot_s")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a study can be told; presets fill it, a file overrides the preset, flags override the file.

    Args:
        strategies: what is compared.
        quality_model: model whose answers are judged; None for the bundled one.
        speed_model: model whose time and memory are measured.
        dtype: of weights and activations.
        device: where models run.
        linear_weights: copies of weights for steps of few tokens on the CPU; see `kvatlas.models.loading.load_model`.
        kv_memory: byte budget of each engine on the device.
        host_memory: byte budget of each engine on the host; "0": there is no such tier.
        link: rate of an emulated link between the two, such as ``16GB/s,10us``; "none" copies at full speed.
        max_batched_tokens: step token limit.
        seed: of prompts, arrivals and sampling.
        repeats: how often a timed point is measured.
        repeat_limit_s: no further repeat begins once a point has taken so long.
        time_limits: seconds after which an experiment begins no further point, ``300`` for all, ``early_fact=600``
            for one; none: each runs to its end.
        prompt_tokens: prompt lengths of ``prompt_length``.
        prompt_model: its model, where the longest prompts are too long for ``speed_model``; None for that one.
        breakdown_prompt_tokens: prompt lengths of ``offload_breakdown``.
        breakdown_output_tokens: output length of ``offload_breakdown``.
        breakdown_links: links of ``offload_breakdown``, written like ``link``.
        breakdown_model: its model; None for ``speed_model``.
        concurrency: numbers of requests of ``concurrency_memory``, ``decode_throughput`` and ``request_latency``.
        concurrency_prompt_tokens: their prompt length.
        concurrency_output_tokens: their output length.
        pool_tries: most runs that look for the smallest pool of ``decode_throughput``.
        output_tokens: output lengths of ``output_length``.
        output_prompt_tokens: prompt length of ``output_length``.
        accuracy_tasks: tasks of ``accuracy_budget``: "single needle", or "16 keys".
        accuracy_context_tokens: context lengths of ``accuracy_budget``.
        accuracy_budgets: kept fractions of ``accuracy_budget``, beside the full cache.
        context_tokens: context lengths of ``early_fact``.
        budgets: kept fractions of ``early_fact``, beside the full cache.
        turns: numbers of turns of ``early_fact``, the one that asks included.
        num_keys: facts per context of ``early_fact``.
        num_prompts: prompts per point of ``accuracy_budget`` and ``early_fact``.
        arrivals: how requests of ``request_rate`` arrive: "poisson", "gamma 0.25", or a trace whose times are taken.
        rates: requests per second of ``request_rate``.
        rate_requests: requests per point of ``request_rate``.
        rate_prompt_tokens: their prompt length.
        rate_output_tokens: their output length.
        models: models of ``model_size``.
        model_prompt_tokens: prompt length of ``model_size``.
        model_output_tokens: output length of ``model_size``.
        model_batch: requests at once of ``model_size``.
        traces: excerpts or files of ``trace_replay``.
        trace_requests: requests taken of each.
        trace_time_scale: factor on arrival times.
        trace_length_scale: factor on lengths.
        trace_max_prompt_tokens: longer prompts are cut.
        slo_ttft_s: limit of goodput on TTFT.
        slo_tpot_s: limit of goodput on TPOT.

    Raises:
        ConfigError: a strategy cannot be read, a number is out of range, or a list is empty.
    """

    strategies: tuple[str, ...] = (
        "full",
        "streaming_llm(sinks=4, recent=0.2)",
        "h2o(heavy=0.1, recent=0.1)",
        "snapkv(budget=0.2, window=16)",
        "offload(host)",
        "infinigen",
    )
    quality_model: str | None = None
    speed_model: str = "random:llama-mini"
    dtype: DType = "auto"
    device: str = "cpu"
    linear_weights: LinearChoice = "auto"
    kv_memory: str = "1GiB"
    host_memory: str = "1GiB"
    link: str = NO_LINK
    max_batched_tokens: int = 512
    seed: int = 0
    repeats: int = 3
    repeat_limit_s: float = math.inf
    time_limits: tuple[str, ...] = ()

    prompt_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    prompt_model: str | None = None

    breakdown_prompt_tokens: tuple[int, ...] = (4096,)
    breakdown_output_tokens: int = 32
    breakdown_links: tuple[str, ...] = (NO_LINK,)
    breakdown_model: str | None = None

    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    concurrency_prompt_tokens: int = 1024
    concurrency_output_tokens: int = 32
    pool_tries: int = 4

    output_tokens: tuple[int, ...] = (128, 512, 2048)
    output_prompt_tokens: int = 2048

    accuracy_tasks: tuple[str, ...] = ("single needle", "16 keys")
    accuracy_context_tokens: tuple[int, ...] = (1024,)
    accuracy_budgets: tuple[float, ...] = (0.5, 0.3, 0.1, 0.04, 0.02)

    context_tokens: tuple[int, ...] = (512, 1024, 2048)
    budgets: tuple[float, ...] = (0.5, 0.2, 0.1)
    turns: tuple[int, ...] = (1,)
    num_keys: int = 1
    num_prompts: int = 400

    arrivals: tuple[str, ...] = ("poisson", "gamma 0.25")
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    rate_requests: int = 32
    rate_prompt_tokens: int = 512
    rate_output_tokens: int = 64

    models: tuple[str, ...] = ("random:llama-55m", "random:llama-125m", "random:llama-1b")
    model_prompt_tokens: int = 512
    model_output_tokens: int = 16
    model_batch: int = 4

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
        self._check_lists()
        check_choice(self.linear_weights)
        parse_bytes(self.kv_memory)
        parse_tier_bytes(self.host_memory)
        for link in (self.link, *self.breakdown_links):
            link_name(link)
        for name in _COUNTS:
            self._check(name, lambda value: 1 <= value <= _MOST, f"at least 1 and at most {_MOST:,}")
        for name in _DECODING:
            between = "the time between tokens is measured"
            self._check(name, lambda value: 2 <= value <= _MOST, f"at least 2, as {between}, and at most {_MOST:,}")
        for name in _BUDGETS:
            self._check(name, lambda value: 0 < value <= 1, "fractions in (0, 1], such as 0.2")
        for name in _POSITIVE:
            self._check(name, lambda value: 0 < value < math.inf, "a finite number above 0")
        self._check("repeat_limit_s", lambda value: value > 0, "seconds above 0; inf: no limit")
        self._check("seed", lambda value: 0 <= value < 2**63, "0 or more, below 2**63")
        self._check("trace_time_scale", lambda value: 0 <= value < math.inf, "a finite factor of at least 0")

    def _check_lists(self) -> None:
        """Refuse empty lists: nothing would be measured, and nobody be told."""
        for field in fields(self):
            if getattr(self, field.name) == () and field.name != "time_limits":
                raise ConfigError(f"{field.name} is empty; name at least one, or leave it out for the preset's")

    def _check(self, name: str, good: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, name)
        if not all(good(one) for one in (value if isinstance(value, tuple) else (value,))):
            raise ConfigError(f"{name}={value} is out of range; write {wanted}")


def link_name(link: str) -> str:
    """Return how records write a link: "none", or its rate in one spelling.

    Raises:
        ConfigError: the text is neither.
    """
    return NO_LINK if link == NO_LINK else str(LinkRate.parse(link))


def time_limit(settings: Settings, experiment: str) -> float:
    """Return the seconds after which ``experiment`` begins no further point; ``math.inf``: no limit.

    Raises:
        ConfigError: an entry of ``time_limits`` is not a positive number of seconds, or contradicts another.
    """
    found: dict[str, float] = {}
    for entry in settings.time_limits:
        name, equals, text = entry.rpartition("=")
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not seconds > 0 or (equals and not name.strip()):
            raise ConfigError(
                f"time limit {entry!r} is not understood; write seconds, such as 300, or early_fact=600 for one"
            )
        if found.setdefault(name.strip(), seconds) != seconds:
            raise ConfigError(f"time limit {entry!r} contradicts an earlier one; leave one of them out")
    return found.get(experiment, found.get("", math.inf))
