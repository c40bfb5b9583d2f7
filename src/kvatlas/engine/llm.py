"""``kvatlas.LLM``: generate from prompts under any strategy, with vLLM's names."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence as Seq
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kvatlas.core.errors import ConfigError
from kvatlas.core.messages import shown
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.prompts import Prompt, encode, split
from kvatlas.engine.request import NewToken, Request, RequestOutput, output_of, raise_if_failed
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.strategies.strategy import Strategy


class LLM:
    """A model, a default strategy, and the engine that runs them.

    Args:
        model: a folder, a hub id, ``"random:llama-100m"``, a model loaded before, or None for the bundled model.
        strategy: default strategy, such as ``"full"`` or ``"h2o(heavy=0.1, recent=0.1)"``.
        kv_memory: byte budget of the cache, such as ``"512MiB"``.
        dtype: of weights and activations; see `kvatlas.models.loading.load_model`.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a CUDA device if there is one.
        linear_weights: copies of weights for steps of few tokens on the CPU; likewise.
        engine_options: further options of `kvatlas.engine.engine.Engine`.

    Example:
        >>> llm = LLM(strategy="streaming_llm(recent=64)")
        >>> output = llm.generate("def add(", SamplingParams(max_tokens=4))[0]
        >>> len(output.outputs[0].token_ids)
        4
    """

    def __init__(
        self,
        model: str | Path | LoadedModel | None = None,
        strategy: str | Strategy = "full",
        kv_memory: str | int = "512MiB",
        *,
        dtype: Any = "auto",
        device: str = "auto",
        linear_weights: Any = "auto",
        **engine_options: Any,
    ) -> None:
        self.strategy = Strategy.parse(strategy)
        if not isinstance(model, LoadedModel):
            model = load_model(model, dtype=dtype, device=device, linear_weights=linear_weights)
        self.engine = Engine(model, kv_memory=kv_memory, **engine_options)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | Seq[str | Strategy] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Return one finished output per prompt, in the order given.

        Args:
            prompts: one prompt or a batch, as `kvatlas.engine.prompts` describes them: texts, token ids, messages.
            sampling_params: for all prompts, or one per prompt.
            strategy: instead of the default, for all prompts or one per prompt; they run in one batch.
            use_tqdm: show a progress bar.

        Raises:
            ConfigError: something is no prompt, no parameters or no strategy, or the lists differ in length; no
                prompt has run then.
            CapacityError: a prompt can never fit; no prompt has run then.
            RequestError: a request failed while it ran; it carries the outputs of all.
        """
        batch = split(prompts)
        many = len(batch) > 1
        ids = [self._encode(prompt, f"prompt {index}" if many else "the prompt") for index, prompt in enumerate(batch)]
        params = [_params(each) for each in _per_prompt(sampling_params, len(ids), "sampling_params")]
        chosen = [self._strategy(each) for each in _per_prompt(strategy, len(ids), "strategy")]
        requests: list[Request] = []
        try:
            for prompt, each, one in zip(ids, params, chosen, strict=True):
                requests.append(self.engine.add_request(prompt, each, one))
            self._finish(requests, use_tqdm)
        finally:
            for request in requests:  # after an error or Ctrl-C nothing keeps running
                self.engine.cancel(request)
        raise_if_failed(requests)
        return [output_of(request) for request in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, strategy: str | Strategy | None = None
    ) -> Iterator[NewToken]:
        """Return an iterator over the tokens of one prompt as they come; leaving the loop early cancels the request.

        Raises:
            ConfigError: something is no prompt, no parameters or no strategy.
            CapacityError: the prompt can never fit; raised with the first token, as is the next one.
            RequestError: the request failed while it ran.
        """
        return self._stream(self._encode(prompt), _params(sampling_params), self._strategy(strategy))

    def session(self, strategy: str | Strategy | None = None) -> Session:
        """Return a conversation that continues on its own cache."""
        return Session(self, self._strategy(strategy))

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; see `kvatlas.engine.prompts.encode`."""
        return self._encode(prompt)

    def _encode(self, prompt: Prompt, name: str = "the prompt", continued: bool = False) -> list[int]:
        model = self.engine.model
        return encode(prompt, model.tokenizer, model.name, name=name, continued=continued)

    def _strategy(self, given: Any) -> Strategy:
        """Return a strategy; None is the default."""
        if given is None:
            return self.strategy
        if not isinstance(given, str | Strategy):
            raise ConfigError(f"a strategy is {shown(given)}; write a sentence such as 'int8 | offload(host)'")
        return Strategy.parse(given)

    def _stream(self, ids: list[int], params: SamplingParams, strategy: Strategy) -> Iterator[NewToken]:
        request = self.engine.add_request(ids, params, strategy)
        request.unread = deque()  # other streams and calls may make its tokens in steps of theirs
        try:
            while request.unread or request.finish_reason is None:
                if request.unread:
                    yield request.unread.popleft()
                else:
                    self.engine.step()
        finally:
            self.engine.cancel(request)
        raise_if_failed([request])

    def _finish(self, requests: Seq[Request], use_tqdm: bool) -> None:
        with Progress(disable=not use_tqdm, transient=True) as progress:
            task = progress.add_task("generating", total=sum(request.params.max_tokens for request in requests))
            while any(request.finish_reason is None for request in requests):
                progress.update(task, advance=len(self.engine.step()))


class Session:
    """A conversation: each turn adds to one cache, under one strategy.

    The cache stays between turns until memory is short; then it is taken back, and made again in the same steps
    when the next turn comes.

    Args:
        llm: the model and engine.
        strategy: what manages the cache.
    """

    def __init__(self, llm: LLM, strategy: Strategy) -> None:
        self._llm = llm
        self._strategy = strategy
        self._request: Request | None = None

    def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> RequestOutput:
        """Return the answer to the next turn.

        The first turn is a prompt like any other. What a later one says goes on where the answer has ended: its text
        gets no special tokens beside those that it writes out, so a conversation has one beginning of text.

        Raises:
            ConfigError: something is no prompt or no parameters; the conversation can go on.
            CapacityError: the conversation would not fit; it can go on with less.
            RequestError: the turn failed while it ran. The conversation is closed; the next turn would start anew.
        """
        engine, params = self._llm.engine, _params(sampling_params)
        ids = self._llm._encode(prompt, continued=self._request is not None)
        if self._request is None:
            self._request = engine.add_request(ids, params, self._strategy)
            self._request.held_by_session = True
        else:
            engine.continue_request(self._request, ids, params)
        request = self._request
        try:
            while request.finish_reason is None:
                engine.step()
            raise_if_failed([request])
        except BaseException:
            self.close()
            raise
        return output_of(request)

    def fork(self) -> Session:
        """Return a second conversation that begins as this one, on the same blocks until they differ.

        Raises:
            ConfigError: no turn has been answered yet.
            UnsupportedError: the strategy evicts tokens.
        """
        if self._request is None:
            raise ConfigError("this session has no turn to fork from; call generate() first")
        copy = Session(self._llm, self._strategy)
        copy._request = self._llm.engine.fork_request(self._request)
        return copy

    def close(self) -> None:
        """Give the cache back; the next turn would start a new conversation."""
        if self._request is not None:
            self._llm.engine.cancel(self._request)
            self._llm.engine.release(self._request)
            self._request = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _per_prompt(given: Any, count: int, name: str) -> list[Any]:
    """Return one value per prompt from one for all or a list."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise ConfigError(f"{name} has {len(given)} entries for {count} prompts; give one, or one per prompt")
    return list(given)


def _params(given: Any) -> SamplingParams:
    """Return sampling parameters; None is the default."""
    if given is None:
        return SamplingParams()
    if not isinstance(given, SamplingParams):
        raise ConfigError(f"sampling_params is {shown(given)}; write SamplingParams(max_tokens=16)")
    return given
