"""What does it save to leave on the device what a selector has chosen of the host?

Two engines decode the same text in turn, step for step: one fetches all that its selector chooses, the other has room
for N tokens of each KV head and layer on the device and fetches what is not there (``offload(host, resident=N)``).
Given are bytes fetched per step, device memory of a request, and over pairs of steps the median seconds with residents
over those without, with its 95 % interval. The link is emulated: its speed is that of the command line, not of a bus.
Expected: what is chosen changes slowly, so most of it is there already; a step is faster where the link is slow enough
to pay for finding that out.

    python benchmarks/residents.py
    python benchmarks/residents.py --link 2GB/s,20us --choosing 'rocket(budget=512)' --resident 2048
"""

from __future__ import annotations

import argparse
import time
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table

from kvatlas.core.units import format_bytes
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.holdings import holdings
from kvatlas.models.loading import load_model
from kvatlas.records.manifest import processor_name
from paired import median_ratio, turned

CHOOSING = ("quest(budget=512)", "rocket(budget=512)", "rehearse(alpha=inf, cap=0.2)")
RESIDENT = (512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--choosing", action="append", help="a selector; may be given more than once")
    parser.add_argument("--resident", action="append", type=int, help="tokens that stay; may be given more than once")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--link", default="2GB/s,10us")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    ids = model.tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"][: options.prompt_tokens]
    table = Table("strategy", "fetched a step", "not fetched", "on the device", "ms a step", "ratio [95 %]")
    for choosing in options.choosing or CHOOSING:
        for resident in options.resident or RESIDENT:
            engines, requests = [], []
            for number in (0, resident):
                engine = Engine(model, kv_memory="2GiB", host_memory="2GiB", link=options.link)
                params = SamplingParams(max_tokens=options.steps + 2, ignore_eos=True)
                sentence = f"{choosing} | offload(host, resident={number})"
                requests.append(engine.add_request(ids, params, sentence))
                engines.append(engine)
                while len(requests[-1].output_ids) < 2:  # the first step fetches everything
                    engine.step()
            before = [engine.link.to_device.num_bytes for engine in engines]
            seconds: list[list[float]] = [[], []]
            for step in range(options.steps - 1):
                for which in turned((0, 1), step):
                    start = time.perf_counter()
                    engines[which].step()
                    seconds[which].append(time.perf_counter() - start)
            assert requests[0].tokens == requests[1].tokens, "residents must not change an answer"
            moved = [
                (engine.link.to_device.num_bytes - was) / len(seconds[0])
                for engine, was in zip(engines, before, strict=True)
            ]
            held = []
            for engine, request in zip(engines, requests, strict=True):
                assert request.seq is not None
                holding = holdings(engine.store, request.seq)
                held.append(
                    holding.device_kv + holding.device_sidecars + holding.device_sketch + holding.device_staging
                )
            ratio = median_ratio(seconds[1], seconds[0])
            for which, number in enumerate((0, resident)):
                told = [f"{choosing}, resident={number}", format_bytes(round(moved[which]))]
                told += ["" if not which else f"{1 - moved[1] / moved[0]:.0%}", format_bytes(held[which])]
                told += [f"{sorted(seconds[which])[len(seconds[which]) // 2] * 1e3:.1f}"]
                told += ["" if not which else f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"]
                table.add_row(*told)
    console = Console(width=120)
    console.print(table)
    console.print(f"{processor_name()}, {options.threads} threads, link {options.link} (emulated)")


if __name__ == "__main__":
    main()
