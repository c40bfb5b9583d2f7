"""The figures that need nothing but lines over a swept value, as a table: experiment -> its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.scene import Scene
from kvatlas.reports.figures.sweep import Panel, Sweep, sweep_plot

_TAIL = (
    "Percentiles are over the requests of a run. Requests of one run wait for each other, so they are not independent: "
    "of several runs the bar is over their percentiles, and the table says what coverage is left; of a single run it "
    "shows how its requests spread, and claims nothing."
)


def plots(scene: Scene) -> list[Plot]:
    """Return the figures of one study."""
    found = [sweep_plot(sweep, scene) for sweep in SWEEPS.get(scene.study.experiment, ())]
    return [plot for plot in found if plot is not None]


def _asked_for(axis: Any, values: Sequence[float]) -> None:
    axis.plot(values, values, color="C0", linestyle=":", linewidth=1, alpha=0.6, zorder=1)


def _panels(*metrics: str, log_y: bool = False) -> tuple[Panel, ...]:
    return tuple(Panel(metric=metric, log_y=log_y) for metric in metrics)


SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "prompt_length": (
        Sweep(
            name="ttft_by_prompt_length",
            title="How long until the first token, as prompts grow, and where do they stop to fit?",
            reading="Lower is better. Both axes are logarithmic: a straight line of slope 1 is linear in the prompt, "
            "slope 2 is quadratic. A cross at the top marks a length that was refused.",
            panels=(Panel(metric="ttft", log_y=True, limits=True),),
        ),
        Sweep(
            name="kv_memory_by_prompt_length",
            title="How much memory does one prompt need: keys and values, and what lies beside them?",
            reading="Lower is better. KV memory is blocks of keys and values; sidecars are what a strategy keeps "
            "beside them, such as importance sums; the host tier holds what was offloaded. Both axes are logarithmic, "
            "so a strategy with nothing there has no mark.",
            panels=_panels(
                "kv_peak", "device_peak", "host_peak", "kv_after_prefill", "sidecars_after_prefill", log_y=True
            ),
        ),
    ),
    "concurrency_memory": (
        Sweep(
            name="memory_by_concurrency",
            title="How much memory on the device and on the host, and how many requests really run at once?",
            reading="Memory counts live bytes at their peak, sidecars included: lower is better. The dotted line is "
            "the number of requests asked for; a strategy below it had to queue, preempt or swap some, so its memory "
            "is that of fewer requests.",
            panels=(
                Panel(metric="device_peak"),
                Panel(metric="host_peak"),
                Panel(metric="peak_running", extra=_asked_for),
                Panel(metric="preemptions"),
                Panel(metric="swaps"),
            ),
        ),
    ),
    "decode_throughput": (
        Sweep(
            name="throughput_by_concurrency",
            title="How many tokens per second, as requests join?",
            reading="Higher is better. Decode throughput leaves out the time in which prompts were processed; "
            "throughput per CPU second leaves out the time in which other programs held the machine. All axes are "
            "logarithmic.",
            panels=_panels("decode_throughput", "output_throughput", "output_throughput_cpu", log_y=True),
        ),
        Sweep(
            name="throughput_per_gb_by_concurrency",
            title="How many tokens per second does each GB of device memory buy?",
            reading="Higher is better. Per GB of live device memory, and per GB of the smallest pool in which the "
            "whole number runs at once without preemption (GB = 10⁹ bytes, sidecars included; no host memory, not the "
            "memory of the whole process). The pool itself: lower is better. All axes are logarithmic.",
            panels=_panels("throughput_per_live_gb", "throughput_per_pool_gb", "smallest_pool", log_y=True),
        ),
    ),
    "request_latency": (
        Sweep(
            name="latency_by_concurrency",
            title="How long does a request take, as more come at once?",
            reading=f"Lower is better; all axes are logarithmic. {_TAIL}",
            panels=_panels("e2e_p50", "e2e_p99", "ttft_p50", "ttft_p99", log_y=True),
        ),
    ),
    "output_length": (
        Sweep(
            name="time_by_output_length",
            title="How does the time grow with the length of the output?",
            reading="Lower is better. Both axes are logarithmic: slope 1 is a constant time per token. The time runs "
            "from the first token to the last.",
            panels=_panels("decode_time", "tpot", log_y=True),
        ),
    ),
    "request_rate": (
        Sweep(
            name="latency_by_rate",
            title="How long do requests wait, as they come faster?",
            reading=f"Lower is better. Left to right: median, 90th and 99th percentile. {_TAIL}",
            panels=_panels("ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p90", "tpot_p99", log_y=True),
            columns=3,
        ),
        Sweep(
            name="goodput_by_rate",
            title="How many requests per second are served within the SLO?",
            reading="Higher is better; the dotted line is all of them. Goodput counts the requests that meet every "
            "limit of the SLO.",
            panels=(Panel(metric="goodput", extra=_asked_for),),
        ),
    ),
}
