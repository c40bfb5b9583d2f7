"""The options of ``kvatlas characterize``, one per field of Settings, grouped as the help shows them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvatlas.cli.options import fractions, whole_numbers

_RUN, _LIMITS = "Models and memory", "How long"
_PROMPT, _BREAKDOWN, _LOAD = (
    "prompt_length",
    "offload_breakdown",
    "concurrency_memory, decode_throughput, request_latency",
)
_OUTPUT, _ACCURACY, _FACT = "output_length", "accuracy_budget", "early_fact"
_RATE, _MODELS, _TRACE = "request_rate", "model_size", "trace_replay"


def _text(help: str, panel: str | None = None, metavar: str = "NAME", name: str | None = None) -> Any:
    return typer.Option(*([name] if name else []), help=help, rich_help_panel=panel, metavar=metavar)


def _number(help: str, panel: str | None = None, name: str | None = None) -> Any:
    return typer.Option(*([name] if name else []), help=help, rich_help_panel=panel)


def _numbers(help: str, panel: str) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, metavar="N,N", parser=whole_numbers)


def _fractions(help: str, panel: str) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, metavar="F,F", parser=fractions)


Texts = list[str] | None

Strategies = Annotated[Texts, _text("Strategy to compare; may be repeated.", metavar="S", name="--strategy")]
Repeats = Annotated[int | None, _number("How often a timed point is measured.")]
Seed = Annotated[int | None, _number("Of prompts, arrivals and sampling.")]

TimeLimits = Annotated[
    Texts,
    _text(
        "An experiment begins no further point after so long: 300, or early_fact=600 for one; may be repeated.",
        _LIMITS,
        "S|NAME=S",
        "--time-limit",
    ),
]
NoTimeLimit = Annotated[
    bool, typer.Option("--no-time-limit", help="Measure every point, however long it takes.", rich_help_panel=_LIMITS)
]
RepeatLimit = Annotated[
    float | None,
    _number("No further repeat of a point begins after so many seconds.", _LIMITS, "--repeat-limit"),
]

SpeedModel = Annotated[str | None, _text("Whose time and memory is measured.", _RUN)]
QualityModel = Annotated[str | None, _text("Whose answers are judged.", _RUN)]
DType = Annotated[str | None, _text("Of weights: auto, float32, bfloat16 or float16.", _RUN)]
Device = Annotated[str | None, _text("auto (a GPU if there is one), cpu, cuda or cuda:<index>.", _RUN)]
LinearWeights = Annotated[
    str | None,
    _text("Copies of weights for steps of few tokens on the CPU: auto, off, fp32, fp16, bf16 or int8.", _RUN),
]
KvMemory = Annotated[str | None, _text("Byte budget of the cache, such as 512MiB.", _RUN, "SIZE")]
HostMemory = Annotated[str | None, _text("Byte budget on the host, for offloading and swaps; 0: none.", _RUN, "SIZE")]
EmulatedLink = Annotated[str | None, _text("Emulated link to the host, such as 16GB/s,10us; or none.", _RUN, "RATE")]
MaxBatchedTokens = Annotated[int | None, _number("Most tokens of one step.", _RUN)]

PromptTokens = Annotated[Any, _numbers("Prompt lengths.", _PROMPT)]
PromptModel = Annotated[str | None, _text("Its model; default: the speed model.", _PROMPT)]

BreakdownPromptTokens = Annotated[Any, _numbers("Prompt lengths.", _BREAKDOWN)]
BreakdownOutputTokens = Annotated[int | None, _number("Output length.", _BREAKDOWN)]
BreakdownLinks = Annotated[Texts, _text("Link, like --link; may be repeated.", _BREAKDOWN, "RATE", "--breakdown-link")]
BreakdownModel = Annotated[str | None, _text("Its model; default: the speed model.", _BREAKDOWN)]

Concurrency = Annotated[Any, _numbers("Numbers of requests.", _LOAD)]
ConcurrencyPromptTokens = Annotated[int | None, _number("Their prompt length.", _LOAD)]
ConcurrencyOutputTokens = Annotated[int | None, _number("Their output length.", _LOAD)]
PoolTries = Annotated[int | None, _number("Most runs that look for the smallest pool.", _LOAD)]

OutputTokens = Annotated[Any, _numbers("Output lengths.", _OUTPUT)]
OutputPromptTokens = Annotated[int | None, _number("Prompt length.", _OUTPUT)]

AccuracyTasks = Annotated[
    Texts, _text("'single needle' or '16 keys'; may be repeated.", _ACCURACY, "TASK", "--accuracy-task")
]
AccuracyContextTokens = Annotated[Any, _numbers("Context lengths.", _ACCURACY)]
AccuracyBudgets = Annotated[Any, _fractions("Kept fractions.", _ACCURACY)]
NumPrompts = Annotated[int | None, _number("Prompts per point, also of early_fact.", _ACCURACY)]

ContextTokens = Annotated[Any, _numbers("Context lengths.", _FACT)]
Budgets = Annotated[Any, _fractions("Kept fractions.", _FACT)]
Turns = Annotated[Any, _numbers("Numbers of turns.", _FACT)]
NumKeys = Annotated[int | None, _number("Facts per context.", _FACT)]

Arrivals = Annotated[Texts, _text("poisson, 'gamma B' or a trace; may be repeated.", _RATE, "NAME", "--arrivals")]
Rates = Annotated[Any, _fractions("Requests per second.", _RATE)]
RateRequests = Annotated[int | None, _number("Requests per point.", _RATE)]
RatePromptTokens = Annotated[int | None, _number("Their prompt length.", _RATE)]
RateOutputTokens = Annotated[int | None, _number("Their output length.", _RATE)]

Models = Annotated[Texts, _text("Model to measure; may be repeated.", _MODELS, "NAME", "--model")]
ModelPromptTokens = Annotated[int | None, _number("Prompt length.", _MODELS)]
ModelOutputTokens = Annotated[int | None, _number("Output length.", _MODELS)]
ModelBatch = Annotated[int | None, _number("Requests at once.", _MODELS)]

Traces = Annotated[
    Texts, _text("azure-conv, mooncake-conversation or a file; may be repeated.", _TRACE, "NAME|FILE", "--trace")
]
TraceRequests = Annotated[int | None, _number("Requests taken of each trace.", _TRACE)]
TraceTimeScale = Annotated[float | None, _number("Factor on arrival times.", _TRACE)]
TraceLengthScale = Annotated[float | None, _number("Factor on lengths.", _TRACE)]
TraceMaxPromptTokens = Annotated[int | None, _number("Longer prompts are cut.", _TRACE)]
SloTtft = Annotated[
    float | None, _text("Goodput's limit on TTFT, seconds, also of request_rate.", _TRACE, "S", "--slo-ttft")
]
SloTpot = Annotated[
    float | None, _text("Goodput's limit on TPOT, seconds, also of request_rate.", _TRACE, "S", "--slo-tpot")
]
