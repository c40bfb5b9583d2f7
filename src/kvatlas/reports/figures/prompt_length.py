"""Figures of the prompt-length sweep: TTFT, and the memory of a prompt with sidecars apart."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.records.schema import RunManifest
from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.figures.sweep import Panel, sweep_plot
from kvatlas.reports.figures.theme import Palette
from kvatlas.reports.series import Study


def plots(study: Study, palette: Palette, runs: Sequence[RunManifest], suffix: str = "") -> list[Plot]:
    """Return the figures of one study; ``suffix`` keeps the names of several studies apart."""
    ttft = sweep_plot(
        study,
        f"ttft_by_prompt_length{suffix}",
        "How long until the first token, as prompts grow?",
        "Lower is better. Both axes are logarithmic: a straight line of slope 1 is linear in the prompt, slope 2 is "
        "quadratic.",
        [Panel(metric="ttft", log_y=True)],
        palette,
        runs,
    )
    memory = sweep_plot(
        study,
        f"kv_memory_by_prompt_length{suffix}",
        "How much memory does one prompt need: keys and values, and what lies beside them?",
        "Lower is better. KV memory is blocks of keys and values; sidecars are what a strategy keeps beside them, such "
        "as importance sums. Both axes are logarithmic, so a strategy without sidecars has no mark there.",
        [
            Panel(metric=metric, log_y=True)
            for metric in ("kv_peak", "kv_after_prefill", "sidecars_after_prefill", "outside_pool_peak")
        ],
        palette,
        runs,
    )
    return [plot for plot in (ttft, memory) if plot is not None]
