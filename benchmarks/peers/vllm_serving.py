"""Does our load driver measure what vLLM's own does, and how does vLLM's CPU build stand beside our engine?

One vLLM server on random weights of a 55M-parameter Llama, float32. In turn, another one first in every repeat:
`kvatlas drive` against it; vLLM's `vllm bench serve --dataset-name timed_trace` against it; and, while it idles, our
engine in a process of its own on the same weights, strategy ``full``. All see the same excerpt of a Mooncake trace, and
the points of `kvatlas` go into one records file for `kvatlas report`.

Expected: the two drivers agree within the spread of the runs, because definitions, arrival times and lengths are
equal. On a shared machine that spread is wide, so each driver is also held against the server's own clock of the same
run (its /metrics): what a driver's mean is longer is HTTP and event loops, some ms. Between vLLM and our
engine no order is expected; the figures say what users of each would wait here.

Equal for both drivers: server, arrival times, prompt and output lengths, which blocks of 32 tokens are shared between
prompts, greedy decoding to the asked length. Not equal: the token ids themselves (each driver draws its own), and what
a prompt's last, partly shared block holds.

    benchmarks/peers/vllm_cpu.sh
    python benchmarks/peers/vllm_serving.py --repeats 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvatlas.models.random import random_model
from kvatlas.records.schema import Row
from kvatlas.records.store import RecordStore
from kvatlas.workloads.excerpts import load_excerpt
from kvatlas.workloads.trace import Trace, scale_trace

MODEL = "random:llama-55m"
VOCABULARY = 32_000
EXCERPT = "mooncake-conversation"
KV_GIB = 1
STEP_TOKENS = 512
BLOCK_TOKENS = 32
MAX_TOKENS = 2048
PEER = "vllm-cpu 0.32.0"
SLO = {"ttft": 3.0, "tpot": 0.15}
START_S = 600
# Sums of the server's histograms; the driver's probe is in them once more than in its own figures, with some 10 ms.
CLOCKS = {
    "TTFT (ms)": ("ttft", "mean_ttft_ms", "vllm:time_to_first_token_seconds_sum"),
    "TPOT (ms)": ("tpot", "mean_tpot_ms", "vllm:request_time_per_output_token_seconds_sum"),
    "E2E (ms)": ("e2e", "mean_e2el_ms", "vllm:e2e_request_latency_seconds_sum"),
}
METRICS = {
    "TTFT, median (ms)": ("ttft", "median_ttft_ms", 1e3),
    "TPOT, median (ms)": ("tpot", "median_tpot_ms", 1e3),
    "E2E, median (ms)": ("e2e", "median_e2el_ms", 1e3),
    "goodput (requests/s)": ("goodput", "request_goodput", 1.0),
    "output throughput (tokens/s)": ("output_throughput", "output_throughput", 1.0),
}
Figures = dict[str, float]


def make_model(folder: Path) -> Path:
    """Write the weights that our engine runs as well, and a tokenizer of one word per id, since vLLM wants one."""
    if not (folder / "tokenizer.json").exists():
        random_model(MODEL).adapter.model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)
    return folder


def write_trace(trace: Trace, path: Path) -> Path:
    """Write the scaled excerpt in Mooncake's format; a rest that no hash covers gets one of its own."""
    lines = []
    for request in trace.requests:
        hashes = list(request.prefix_hashes)
        if len(hashes) * BLOCK_TOKENS < request.prompt_tokens:
            hashes += [10**9 + 10**4 * request.number + i for i in range(1 + request.prompt_tokens // BLOCK_TOKENS)]
        values = {"timestamp": request.arrival_s * 1e3, "hash_ids": hashes}
        lengths = {"input_length": request.prompt_tokens, "output_length": request.output_tokens}
        lines.append(json.dumps(values | lengths))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def serving(vllm: Path, model: Path, log: Path) -> Iterator[str]:
    """Run a server until the block ends; yield its URL once it answers /health."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(vllm, "serve", model, "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", port),
        *("--dtype", "float32", "--max-model-len", MAX_TOKENS, "--max-num-batched-tokens", STEP_TOKENS),
        *("--block-size", BLOCK_TOKENS, "--enforce-eager", "--enable-prompt-tokens-details"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    print("$", shown(command, environment))
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, server, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    begun = time.monotonic()
    while time.monotonic() < begun + START_S:
        if server.poll() is not None:
            raise SystemExit(f"error: the server ended with status {server.returncode}; its log: {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            print(f"server ready after {time.monotonic() - begun:.0f} s")
            return
        time.sleep(1)
    raise SystemExit(f"error: the server is not ready after {START_S} s; its log: {log}")


def shown(command: list[Any], environment: dict[str, str]) -> str:
    names = [f"{name}={value}" for name, value in environment.items()]
    return " ".join([*names, *(str(part) for part in command)])


def run(command: list[Any], environment: dict[str, str] | None = None) -> None:
    """Run a command to its end; show what it said if it failed."""
    environment = environment or {}
    print("$", shown(command, environment), flush=True)
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("note:")))
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nerror: status {done.returncode} of the command above")


def kvatlas(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "kvatlas", *arguments]


def traffic(options: argparse.Namespace, prefix: str) -> list[object]:
    """Return the options that say which requests to send; `drive` and `characterize` differ in their prefix."""
    values = {
        "requests": options.requests,
        "time-scale": options.time_scale,
        "length-scale": options.length_scale,
        "max-prompt-tokens": options.max_prompt_tokens,
    }
    scales = [part for name, value in values.items() for part in (f"--{prefix}{name}", value)]
    slo = ["--slo-ttft", SLO["ttft"], "--slo-tpot", SLO["tpot"]]
    conditions = ["--kv-memory", f"{KV_GIB}GiB", "--max-batched-tokens", STEP_TOKENS, "--threads", 1]
    return ["--trace", EXCERPT, *scales, *slo, *conditions, "--dtype", "float32"]


def server_sums(url: str) -> Figures:
    """Return the sums of the server's own latency histograms since it started, seconds."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {
        name: sum(float(line[-1]) for line in lines if line[0].partition("{")[0] == metric)
        for name, (_, _, metric) in CLOCKS.items()
    }


def means(before: Figures, after: Figures, requests: int) -> Figures:
    """Return the mean latencies that the server itself saw between two readings, ms."""
    return {name: (after[name] - before[name]) / requests * 1e3 for name in CLOCKS}


def drive(url: str, seed: int, options: argparse.Namespace) -> Figures:
    """Run our driver; return the means of the server's own clock."""
    before = server_sums(url)
    command = kvatlas("drive", url, "--name", PEER, "--vocabulary", VOCABULARY, "--seed", seed)
    run([*command, *traffic(options, ""), "--records", options.records])
    return means(before, server_sums(url), options.requests)


def bench(
    vllm: Path, url: str, model: Path, trace: Path, seed: int, options: argparse.Namespace
) -> tuple[Figures, Figures]:
    """Run vLLM's own driver; return its figures, in its own units, and its means less those of the server's clock."""
    before = server_sums(url)
    out = options.folder / f"bench-{seed}.json"
    command = [
        *(vllm, "bench", "serve", "--backend", "vllm", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", MODEL, "--tokenizer", model, "--dataset-name", "timed_trace", "--dataset-path", trace),
        *("--self-timed", "--timed-trace-chunk-hash-size", BLOCK_TOKENS, "--timed-trace-sec-multiplier", 0.001),
        *("--num-prompts", options.requests, "--temperature", 0, "--seed", seed, "--disable-tqdm"),
        *("--goodput", *(f"{name}:{limit * 1e3:g}" for name, limit in SLO.items())),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result", "--save-detailed"),
        *("--result-dir", out.parent, "--result-filename", out.name),
    ]
    run(command, {"PYTHONHASHSEED": str(seed), "HF_HUB_OFFLINE": "1"})
    served = means(before, server_sums(url), options.requests)
    found = json.loads(out.read_text(encoding="utf-8"))
    if found["failed"] or found["completed"] != options.requests:
        raise SystemExit(f"error: vllm bench serve finished {found['completed']} of {options.requests}; see {out}")
    totals = {name: float(found[name]) for name in ("total_input_tokens", "total_output_tokens", "duration")}
    figures = {name: float(found[theirs]) for name, (_, theirs, _) in METRICS.items()}
    own = {name: float(found[theirs]) for name, (_, theirs, _) in CLOCKS.items()}
    own["TPOT (ms)"] *= sum(length > 1 for length in found["output_lens"]) / options.requests  # the server counts 0
    return figures | totals, {name: own[name] - served[name] for name in CLOCKS}


def samples(records: Path, strategy: str) -> dict[int, dict[str, list[Row]]]:
    """Return seed -> metric -> samples of a strategy's run."""
    with RecordStore(records, mode="read") as store:
        rows = sorted(store.rows("trace_replay", strategy=strategy), key=lambda row: (row.seed, row.metric))
    found: dict[int, dict[str, list[Row]]] = {}
    for (seed, metric), group in groupby(rows, key=lambda row: (row.seed, row.metric)):
        found.setdefault(seed, {})[metric] = list(group)
    return found


def figures(records: Path, strategy: str) -> dict[int, Figures]:
    """Return seed -> the figures of a strategy's run, medians over its requests, in the units of `METRICS`."""
    return {
        seed: {
            name: statistics.median(row.value for row in metrics[ours]) * factor
            for name, (ours, _, factor) in METRICS.items()
        }
        for seed, metrics in samples(records, strategy).items()
    }


def beyond(records: Path, served: dict[int, Figures], requests: int) -> list[Figures]:
    """Return our driver's means less those of the server's clock in the same run, ms.

    The server counts the TPOT of a request of one token as 0, so the sums are compared.
    """
    found = samples(records, f"peer: {PEER}")
    return [
        {
            name: sum(row.value for row in found[seed][ours]) / requests * 1e3 - clock[name]
            for name, (ours, _, _) in CLOCKS.items()
        }
        for seed, clock in served.items()
    ]


def told(runs: list[Figures], name: str) -> str:
    values = [one[name] for one in runs]
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def agree(ours: list[Figures], theirs: list[Figures], name: str) -> bool:
    """Whether the ranges of the runs overlap."""
    a, b = [one[name] for one in ours], [one[name] for one in theirs]
    return min(a) <= max(b) and min(b) <= max(a)


def table(driven: list[Figures], benched: list[Figures], engine: list[Figures]) -> Table:
    found = Table("median of runs (range)", "vLLM by kvatlas drive", "vLLM by its bench serve", "agree", "our engine")
    for name in METRICS:
        same = "yes" if agree(driven, benched, name) else "NO"
        found.add_row(name, told(driven, name), told(benched, name), same, told(engine, name) if engine else "not run")
    return found


def clocks(driven: list[Figures], benched: list[Figures]) -> Table:
    found = Table("mean less the server's, same run", "kvatlas drive", "vllm bench serve")
    for name in CLOCKS:
        found.add_row(name, told(driven, name), told(benched, name))
    return found


def parse() -> argparse.Namespace:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=root / "out/peers/vllm-cpu", help="environment of vllm-cpu")
    parser.add_argument("--folder", type=Path, default=root / "out/peers/serving", help="where everything is written")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--time-scale", type=float, default=6.0)
    parser.add_argument("--length-scale", type=float, default=1 / 16)
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--no-engine", action="store_true", help="leave our engine out")
    options = parser.parse_args()
    options.records = options.folder / "records.duckdb"
    return options


def main() -> None:
    options = parse()
    vllm = options.vllm / "bin" / "vllm"
    if not vllm.exists():
        raise SystemExit(f"error: {vllm} does not exist; install it with benchmarks/peers/vllm_cpu.sh")
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    model = make_model(options.vllm.parent / "llama-55m")
    excerpt = scale_trace(
        load_excerpt(EXCERPT),
        time_scale=options.time_scale,
        length_scale=options.length_scale,
        limit=options.requests,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    trace = write_trace(excerpt, options.folder / "trace.jsonl")
    benched: list[Figures] = []
    benched_beyond: list[Figures] = []
    served: dict[int, Figures] = {}
    with serving(vllm, model, options.folder / "server.log") as url:
        for seed in range(options.repeats):
            turns = ["drive", "bench", *([] if options.no_engine else ["engine"])]
            for turn in turns[seed % len(turns) :] + turns[: seed % len(turns)]:
                if turn == "drive":
                    served[seed] = drive(url, seed, options)
                elif turn == "engine":
                    measure_engine(seed, options)
                else:
                    found, less = bench(vllm, url, model, trace, seed, options)
                    benched.append(found)
                    benched_beyond.append(less)
    run(kvatlas("report", "--records", options.records, "--out", options.folder / "report"))
    ours = figures(options.records, "full")
    driven, driven_beyond = figures(options.records, f"peer: {PEER}"), beyond(options.records, served, options.requests)
    console = Console(width=150)
    console.print(table(list(driven.values()), benched, list(ours.values())))
    console.print(clocks(driven_beyond, benched_beyond))
    facts = {"model": MODEL, "peer": PEER, "requests": options.requests, "repeats": options.repeats}
    runs = {"driven": driven, "benched": benched, "engine": ours}
    less = {"driven": driven_beyond, "benched": benched_beyond}
    print(json.dumps({"benchmark": "vllm_serving", **facts, "runs": runs, "less_server_clock": less}))


def measure_engine(seed: int, options: argparse.Namespace) -> None:
    command = kvatlas("characterize", "trace_replay", "--strategy", "full", "--speed-model", MODEL, "--seed", seed)
    run([*command, *traffic(options, "trace-"), "--records", options.records])


if __name__ == "__main__":
    main()
