"""The requests of a point: from a trace, or drawn. Our engine and a server of others get the same ones.

Prompts are random token ids, equal for equal params, vocabulary and seed; equal prefix hashes of a trace are really
equal tokens.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from kvatlas.core.errors import ConfigError, TraceError
from kvatlas.experiments.load import Arrival, Observation
from kvatlas.metrics.latency import RequestTimes, Slo, goodput, output_throughput, request_throughput
from kvatlas.records.contents import file_digest
from kvatlas.records.schema import Params, Sample
from kvatlas.workloads.arrivals import gamma_arrivals
from kvatlas.workloads.excerpts import EXCERPT_NAMES, load_excerpt
from kvatlas.workloads.materialize import prompt_ids
from kvatlas.workloads.trace import Trace, read_trace, scale_trace

_GAMMA = re.compile(r"gamma (inf|\d+(?:\.\d+)?(?:e[-+]?\d+)?)")


def load_trace(name: str, limit: int | None = None) -> Trace:
    """Return a bundled excerpt by its name, else the trace in the file of that name.

    Args:
        name: of the excerpt or file.
        limit: requests that are needed; files of conversations, which may be large, are read no further.

    Raises:
        TraceError: the file or a line of it cannot be read.
    """
    return load_excerpt(name) if name in EXCERPT_NAMES else read_trace(name, limit=limit)


def trace_params(name: str) -> Params:
    """Return what a point says of a trace beside its name: for a file, a digest of what it holds.

    Raises:
        TraceError: the file cannot be read.
    """
    path = Path(name)
    if name in EXCERPT_NAMES or not path.is_file():
        return {}
    try:
        return {"trace_digest": file_digest(path)}
    except OSError as error:
        raise TraceError(f"trace {name} cannot be read ({error.strerror}); check the path and its rights") from error


def trace_traffic(params: Params, vocabulary: int, seed: int) -> list[Arrival]:
    """Return the requests of a trace, scaled, in order of arrival.

    Args:
        params: trace, requests, time_scale, length_scale, max_prompt_tokens.
        vocabulary: token ids are below it.
        seed: of the prompts.

    Raises:
        TraceError: the trace cannot be read.
        ConfigError: a factor or number is out of range.
    """
    trace = scale_trace(
        load_trace(str(params["trace"]), int(params["requests"])),
        time_scale=float(params["time_scale"]),
        length_scale=float(params["length_scale"]),
        limit=int(params["requests"]),
        max_prompt_tokens=int(params["max_prompt_tokens"]),
    )
    return [
        Arrival(
            at_s=request.arrival_s,
            prompt_ids=prompt_ids(request, vocabulary, seed),
            output_tokens=request.output_tokens,
        )
        for request in trace.requests
    ]


def drawn_traffic(params: Params, vocabulary: int, seed: int) -> list[Arrival]:
    """Return requests of one length that arrive at random, with unrelated prompts, in order of arrival.

    Args:
        params: arrivals (see `arrival_times`), rate, requests, prompt_tokens, output_tokens.
        vocabulary: token ids are below it.
        seed: of arrival times and prompts.

    Raises:
        ConfigError: the arrivals are not understood, or a number is out of range.
    """
    count, length = int(params["requests"]), int(params["prompt_tokens"])
    times = arrival_times(str(params["arrivals"]), count, float(params["rate"]), seed)
    prompts = np.random.default_rng((seed, 1)).integers(vocabulary, size=(count, length)).tolist()
    return [
        Arrival(at_s=at_s, prompt_ids=prompt, output_tokens=int(params["output_tokens"]))
        for at_s, prompt in zip(times, prompts, strict=True)
    ]


def arrival_times(arrivals: str, count: int, rate: float, seed: int) -> list[float]:
    """Return when ``count`` requests arrive, seconds; the last one at count / rate.

    Args:
        arrivals: "poisson", "gamma 0.25" with its burstiness, or a trace, whose first times are stretched to the rate.
        count: how many.
        rate: requests per second.
        seed: of random arrivals.

    Raises:
        ConfigError: the arrivals are not understood, or the trace holds fewer requests.
        TraceError: the trace cannot be read.
    """
    if not _is_trace(arrivals):
        return gamma_arrivals(count, rate, burstiness_of(arrivals), seed)
    requests = load_trace(arrivals).requests[:count]
    if len(requests) < count:
        raise ConfigError(f"trace {arrivals!r} holds {len(requests)} requests, {count} are asked for; ask for fewer")
    last = requests[-1].arrival_s
    return [request.arrival_s / last * count / rate if last else 0.0 for request in requests]


def check_arrivals(arrivals: str) -> None:
    """Find out before anything runs whether arrivals are known.

    Raises:
        ConfigError: neither a process nor a trace has this name.
        TraceError: the trace cannot be read.
    """
    if _is_trace(arrivals):
        load_trace(arrivals)
    else:
        burstiness_of(arrivals)


def _is_trace(arrivals: str) -> bool:
    return arrivals in EXCERPT_NAMES or Path(arrivals).is_file()


def arrivals_name(burstiness: float) -> str:
    """Return what records call arrivals of this burstiness: "poisson" for 1, else "gamma 0.25"."""
    return "poisson" if burstiness == 1 else f"gamma {burstiness:g}"


def burstiness_of(arrivals: str) -> float:
    """Return the burstiness of "poisson" or "gamma 0.25".

    Raises:
        ConfigError: the name is another.
    """
    match = _GAMMA.fullmatch(arrivals)
    if arrivals != "poisson" and match is None:
        raise ConfigError(f"arrivals {arrivals!r} are not understood; write poisson, 'gamma 0.25' or a trace")
    return float(match[1]) if match else 1.0


def latency_samples(times: list[RequestTimes], wall_s: float, slo: Slo) -> list[Sample]:
    """Return TTFT, E2E and TPOT of each request (equal index, equal request), and the rates of the whole run."""
    samples = []
    for index, request in enumerate(times):
        samples.append(Sample(metric="ttft", unit="s", value=request.ttft_s, index=index))
        samples.append(Sample(metric="e2e", unit="s", value=request.e2e_s, index=index))
        if request.tpot_s is not None:
            samples.append(Sample(metric="tpot", unit="s", value=request.tpot_s, index=index))
    rates = {
        ("goodput", "requests/s"): goodput(times, slo, wall_s),
        ("request_throughput", "requests/s"): request_throughput(times, wall_s),
        ("output_throughput", "tokens/s"): output_throughput(times, wall_s),
    }
    return samples + [Sample(metric=metric, unit=unit, value=value) for (metric, unit), value in rates.items()]


def load_samples(seen: Observation) -> list[Sample]:
    """Return what a run of our engine showed of memory: its peak, preemptions, requests at once, shared tokens."""
    totals = {
        ("kv_peak", "bytes"): seen.peak_used_bytes,
        ("preemptions", "preemptions"): seen.preemptions,
        ("peak_running", "requests"): seen.peak_running,
        ("cached_prompt_tokens", "tokens"): sum(request.adopted_tokens for request in seen.requests),
    }
    return [Sample(metric=metric, unit=unit, value=value) for (metric, unit), value in totals.items()]
