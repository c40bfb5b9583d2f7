"""How good is what a selector chooses, on a language model that was really trained?

Text of the standard library's own documentation is continued greedily under each strategy; at every step and layer
that chooses, the choice is compared with the exact scores over all that is cached. *Recall* is the share of the tokens
with the most attention, as many as were chosen, that were chosen; *mass* the share of the exact attention that falls on
what was read; *read* the share of the cached tokens that was. Each is a mean over steps, layers and texts, with the
least and the most of the texts.
Expected: at equal shares, finer grains find more: tokens by partial keys, then small pages, then blocks.

    python benchmarks/selection_recall.py
    python benchmarks/selection_recall.py --prompt-tokens 4096 --strategy 'quest(budget=1024)' --strategy infinigen
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pydoc_data.topics import topics
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.selection import Probe
from kvatlas.models.loading import LoadedModel, load_model

STRATEGIES = (
    "quest(budget=256)",
    "quest(budget=512)",
    "rocket(budget=512)",
    "rocket(budget=512, page=2)",
    "rocket(budget=1024)",
    "infinigen",
    "rehearse(alpha=inf, cap=0.25) | offload(host)",
    "rocketkv",
    "kivi(bits=4) | quest(budget=512)",
    "snapkv(budget=0.5) | quest(budget=512)",
)


def observe(model: LoadedModel, strategy: str, prompt: Sequence[int], steps: int, memory: str) -> Probe:
    """Return how good the choices of one continuation were."""
    engine = Engine(model, kv_memory=memory, host_memory=memory, enable_prefix_caching=False)
    request = engine.add_request(prompt, SamplingParams(max_tokens=steps, ignore_eos=True), strategy)
    engine.observe_selection()
    while engine.has_work:
        engine.step()
    if request.error is not None:
        raise request.error
    assert engine.probe is not None
    return engine.probe


def shown(values: list[float]) -> str:
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--strategy", action="append", help="may be given more than once")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--texts", type=int, default=3, help="at least 1")
    parser.add_argument("--memory", default="2GiB", help="of each tier")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    ids = model.tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    starts = [number * (len(ids) - options.prompt_tokens) // options.texts for number in range(options.texts)]
    table = Table("strategy", "recall [least, most]", "mass", "read")
    for strategy in options.strategy or STRATEGIES:
        probes = [
            observe(model, strategy, ids[start : start + options.prompt_tokens], options.output_tokens, options.memory)
            for start in starts
        ]
        if not all(probe.count for probe in probes):
            table.add_row(strategy, "chooses nothing", "", "")
            continue
        columns = ([getattr(probe, name) for probe in probes] for name in ("recall", "mass", "selected_fraction"))
        table.add_row(strategy, *map(shown, columns))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
