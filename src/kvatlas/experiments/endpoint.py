"""An OpenAI-compatible server: which model it serves, and what it understands beyond OpenAI's completions.

vLLM, SGLang and llama.cpp's server take token ids as prompts and some fields that make runs comparable; others refuse
them with status 400. What is taken is settled once, before anything is measured.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx

from kvatlas.core.errors import ConfigError, EndpointError
from kvatlas.experiments.load import Arrival
from kvatlas.experiments.streams import error_text

# Fields beyond OpenAI's completions, in the order in which they are given up; the last is OpenAI's, but late. Not among
# them is vLLM's return_token_ids: it sends the prompt back with the first token, and so delays what is measured.
EXTENSIONS = ("continuous_usage_stats", "min_tokens", "ignore_eos", "stream_options")

_REFUSED = (400, 422)
_PROBE = (8, 2)
_CONNECT_S = 10.0
_IDLE_S = 2.0  # servers close idle connections after 5 s; one that closes while it is taken up again fails a request
_Found = TypeVar("_Found")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server listens, and how patient to be.

    Args:
        url: such as ``http://localhost:8000``; ``/v1`` and ``/v1/completions`` may follow.
        model: its name there, listed or not, since some servers load what they are asked for; None for the first that
            the server lists.
        api_key: sent as a bearer token, or None.
        timeout_s: a request that has not ended after this time has failed, seconds.

    Raises:
        ConfigError: the URL or the timeout cannot be used.
    """

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not _is_http(self.url):
            raise ConfigError(f"endpoint {self.url!r} is not understood; write it like http://localhost:8000")
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s={self.timeout_s} is out of range; write a number of seconds above 0")

    @property
    def base(self) -> str:
        """The URL without ``/v1`` or ``/v1/completions``, and without a password."""
        bare = str(httpx.URL(self.url).copy_with(userinfo=b"", query=None, fragment=None))
        return bare.rstrip("/").removesuffix("/completions").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server says of its model.

    Args:
        name: as requests must call it.
        vocabulary: number of token ids (llama.cpp tells), or None.
        max_tokens: longest prompt and output together (vLLM tells), or None.
    """

    name: str
    vocabulary: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What the server understands, found out before anything is measured.

    Args:
        extensions: those of `EXTENSIONS` that it takes.
        text: prompts go as text because it refuses token ids: each id as a blank and a letter, one token to most
            tokenizers, so lengths are about right; what the server counted is kept.
    """

    extensions: tuple[str, ...] = EXTENSIONS
    text: bool = False

    def body(self, model: str, arrival: Arrival) -> dict[str, Any]:
        """Return the JSON of one request: greedy, streamed, as long as asked whatever the model would end with."""
        every_event = {"continuous_usage_stats": True} if "continuous_usage_stats" in self.extensions else {}
        values = {
            "min_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, **every_event},
        }
        return {
            "model": model,
            "prompt": _as_text(arrival.prompt_ids) if self.text else arrival.prompt_ids,
            "max_tokens": arrival.output_tokens,
            "temperature": 0,
            "stream": True,
            **{name: value for name, value in values.items() if name in self.extensions},
        }

    def without(self, complaint: str) -> Dialect | None:
        """Return what to try after a refusal: without the extension it names, with text, without one more; or None."""
        named = next((name for name in self.extensions if name in complaint), None)
        if named:
            return replace(self, extensions=tuple(name for name in self.extensions if name != named))
        if not self.text and "prompt" in complaint:
            return replace(self, text=True)
        if self.extensions:
            return replace(self, extensions=self.extensions[1:])
        return None if self.text else Dialect(text=True)


def describe_endpoint(endpoint: Endpoint) -> ServedModel:
    """Return what the server says of the model to use.

    Raises:
        EndpointError: it cannot be reached, refuses, or lists no model while none is named.
    """
    return asyncio.run(_describe(endpoint))


async def _describe(endpoint: Endpoint) -> ServedModel:
    async with open_client(endpoint) as client:
        listed = await reaching(endpoint, _listing(client, endpoint))
    models = {str(one["id"]): one for one in listed if isinstance(one, dict) and "id" in one}
    if endpoint.model is None and not models:
        raise EndpointError(f"{endpoint.base}/v1/models lists no model; load one, or name it: --served-model-name NAME")
    name = endpoint.model or next(iter(models))
    facts = models.get(name, {})
    meta = facts.get("meta")
    vocabulary = meta.get("n_vocab") if isinstance(meta, dict) else None
    return ServedModel(name=name, vocabulary=_positive(vocabulary), max_tokens=_positive(facts.get("max_model_len")))


async def _listing(client: httpx.AsyncClient, endpoint: Endpoint) -> list[Any]:
    """Return the server's models; none where the list fails but a model is named: it tells lengths, no more."""
    response = await client.get("/v1/models")
    if response.status_code not in (200, 401, 403) and endpoint.model is not None:
        return []
    if response.status_code != 200:
        raise _refusal(endpoint, response)
    with suppress(ValueError, AttributeError):
        listed = response.json().get("data")
        return listed if isinstance(listed, list) else []
    raise EndpointError(f"{endpoint.base}/v1/models answers no JSON; is it an OpenAI-compatible server?")


async def settle(client: httpx.AsyncClient, endpoint: Endpoint, model: str, arrival: Arrival) -> Dialect:
    """Return the dialect of the server, found with a few tokens of a prompt; this also warms it up."""
    prompt, output = _PROBE
    probe = Arrival(at_s=0.0, prompt_ids=arrival.prompt_ids[-prompt:], output_tokens=min(output, arrival.output_tokens))
    dialect: Dialect | None = Dialect()
    while dialect is not None:
        response = await client.post("/v1/completions", json=dialect.body(model, probe))
        if response.status_code == 200:
            return dialect
        if response.status_code not in _REFUSED:
            break
        dialect = dialect.without(response.text)
    raise _refusal(endpoint, response)


async def reaching(endpoint: Endpoint, call: Awaitable[_Found]) -> _Found:
    """Return what the call returns; say what to do where nobody answers."""
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            return await call
    except TimeoutError as error:
        raise EndpointError(
            f"{endpoint.base} gives no answer within {endpoint.timeout_s:g} s; "
            "wait until it is ready, or raise --timeout"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EndpointError(
            f"{endpoint.base} cannot be reached ({error or type(error).__name__}); start the server, or check the URL"
        ) from error


def open_client(endpoint: Endpoint) -> httpx.AsyncClient:
    """Return a client that never queues requests itself: the server's queue is what is measured."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    user = httpx.URL(endpoint.url)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S)
    return httpx.AsyncClient(
        base_url=endpoint.base,
        headers=headers,
        auth=(user.username, user.password) if user.userinfo and not endpoint.api_key else None,
        limits=limits,
        timeout=httpx.Timeout(None, connect=_CONNECT_S),
    )


def _refusal(endpoint: Endpoint, response: httpx.Response) -> EndpointError:
    steps = {401: "give --api-key or set OPENAI_API_KEY", 403: "give --api-key or set OPENAI_API_KEY"}
    step = steps.get(response.status_code, "see the server's log")
    return EndpointError(f"{endpoint.base} refuses: {said(response)}; {step}")


def said(response: httpx.Response) -> str:
    """Return status and message of a refusal, in one line."""
    try:
        body: object = response.json()
    except ValueError:
        body = response.text or response.reason_phrase
    return f"HTTP {response.status_code}, {error_text(body)}"


def _is_http(url: str) -> bool:
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parts.scheme in ("http", "https") and bool(parts.host)


def _as_text(prompt_ids: Sequence[int]) -> str:
    return "".join(f" {_LETTERS[token % len(_LETTERS)]}" for token in prompt_ids)


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
