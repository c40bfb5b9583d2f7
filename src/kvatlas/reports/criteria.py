"""What "best" means, per experiment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What "best" means.

    Args:
        experiment: where it is measured.
        name: in words, for a table.
        metric: what is compared, at its median, percentile or share.
        higher_is_better: False for latencies and bytes.
        short: its name in the answer of one paragraph; "" leaves it out there.
    """

    experiment: str
    name: str
    metric: str
    higher_is_better: bool = False
    short: str = ""


_PER_GB = "throughput per GB of live device memory"

# experiment, name, metric, short, whether higher is better
CRITERIA = tuple(
    Criterion(experiment=experiment, name=name, metric=metric, short=short, higher_is_better=higher)
    for experiment, name, metric, short, higher in (
        ("prompt_length", "TTFT", "ttft", "TTFT", False),
        ("prompt_length", "CPU time of prefill", "prefill_cpu", "", False),
        ("prompt_length", "KV memory, peak of prefill", "kv_peak", "", False),
        (
            "prompt_length",
            "KV memory after prefill, with sidecars",
            "cache_after_prefill",
            "KV memory after prefill",
            False,
        ),
        ("prompt_length", "KV memory after prefill", "kv_after_prefill", "KV memory", False),
        ("prompt_length", "Host memory, peak", "host_peak", "", False),
        ("offload_breakdown", "Time of a decode step", "step_time", "decode step", False),
        ("offload_breakdown", "Device memory, peak", "device_peak", "", False),
        ("concurrency_memory", "Device memory, peak", "device_peak", "peak device memory", False),
        ("concurrency_memory", "Host memory, peak", "host_peak", "", False),
        ("concurrency_memory", "Requests at once", "peak_running", "", True),
        ("decode_throughput", "Decode throughput", "decode_throughput", "decode throughput", True),
        ("decode_throughput", "Output throughput", "output_throughput", "", True),
        ("decode_throughput", "Output throughput per CPU second", "output_throughput_cpu", "", True),
        ("decode_throughput", "Throughput per GB of live device memory", "throughput_per_live_gb", _PER_GB, True),
        ("decode_throughput", "Throughput per GB of the smallest pool", "throughput_per_pool_gb", "", True),
        ("request_latency", "End-to-end latency, median", "e2e_p50", "median latency", False),
        ("request_latency", "End-to-end latency, p99", "e2e_p99", "", False),
        ("request_latency", "TTFT, median", "ttft_p50", "", False),
        ("request_latency", "TPOT, median", "tpot_p50", "", False),
        ("output_length", "Time from first token to last", "decode_time", "decode time", False),
        ("accuracy_budget", "Right answers", "correct", "right answers", True),
        ("accuracy_budget", "KV memory after prefill", "kv_after_prefill", "", False),
        ("early_fact", "Retention", "correct", "retention", True),
        ("early_fact", "KV memory after prefill", "kv_after_prefill", "", False),
        ("request_rate", "TTFT, median", "ttft_p50", "median TTFT", False),
        ("request_rate", "TTFT, p99", "ttft_p99", "", False),
        ("request_rate", "TPOT, median", "tpot_p50", "", False),
        ("request_rate", "TPOT, p99", "tpot_p99", "", False),
        ("request_rate", "Goodput", "goodput", "goodput", True),
        ("trace_replay", "TTFT, median request", "ttft", "median TTFT", False),
        ("trace_replay", "TPOT, median request", "tpot", "median TPOT", False),
        ("trace_replay", "Goodput", "goodput", "goodput", True),
        ("trace_replay", "Throughput", "output_throughput", "throughput", True),
        ("trace_replay", "KV memory, peak", "kv_peak", "peak KV memory", False),
        ("model_size", "TTFT", "ttft", "", False),
        ("model_size", "TPOT", "tpot", "TPOT", False),
        ("model_size", "Output throughput", "output_throughput", "", True),
        ("model_size", "Device memory, peak", "device_peak", "", False),
        ("evaluate", "Accuracy", "acc", "accuracy", True),
        ("evaluate", "Accuracy, length-normalised", "acc_norm", "", True),
        ("evaluate", "Exact matches", "exact_match", "exact matches", True),
        ("evaluate", "Right answers", "correct", "right answers", True),
    )
)
