"""``kvatlas.LLM``: generate from prompts under any strategy, with vLLM's names."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence as Seq
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kvatlas.core.errors import ConfigError
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import NewToken, Request, RequestOutput, output_of
from kvatlas.models.loading import LoadedModel, load_model
from kvatlas.strategies.strategy import Strategy

Prompt = str | Seq[int]


class LLM:
    """A model, a default strategy, and the engine that runs them.

    Args:
        model: a folder, a hub id, ``"random:llama-100m"``, a model loaded before, or None for the bundled model.
        strategy: default strategy, such as ``"full"`` or ``"h2o(heavy=0.1, recent=0.1)"``.
        kv_memory: byte budget of the cache, such as ``"512MiB"``.
        dtype: of weights and activations; see `kvatlas.models.loading.load_model`.
        device: ``"cpu"`` or ``"cuda"``.
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
        device: str = "cpu",
        linear_weights: Any = "auto",
        **engine_options: Any,
    ) -> None:
        self.strategy = Strategy.parse(strategy)
        if not isinstance(model, LoadedModel):
            model = load_model(model, dtype=dtype, device=device, linear_weights=linear_weights)
        self.engine = Engine(model, kv_memory=kv_memory, **engine_options)

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | Seq[str | Strategy] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Return one finished output per prompt, in the order given.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one per prompt.
            strategy: instead of the default, for all prompts or one per prompt; they run in one batch.
            use_tqdm: show a progress bar.

        Raises:
            ConfigError: a prompt is empty, or the lists differ in length.
            CapacityError: a prompt can never fit; no prompt has run then.
        """
        batch = self._as_batch(prompts)
        params = _per_prompt(
            SamplingParams() if sampling_params is None else sampling_params, len(batch), "sampling_params"
        )
        chosen = _per_prompt(self.strategy if strategy is None else strategy, len(batch), "strategy")
        requests: list[Request] = []
        try:
            for prompt, each, one in zip(batch, params, chosen, strict=True):
                requests.append(self.engine.add_request(self.encode(prompt), each, one))
            self._finish(requests, use_tqdm)
        finally:
            for request in requests:  # after an error or Ctrl-C nothing keeps running
                self.engine.cancel(request)
        return [output_of(request) for request in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, strategy: str | None = None
    ) -> Iterator[NewToken]:
        """Yield the tokens of one prompt as they come; leaving the loop early cancels the request."""
        request = self.engine.add_request(
            self.encode(prompt), sampling_params, self.strategy if strategy is None else strategy
        )
        request.unread = deque()  # other streams and calls may make its tokens in steps of theirs
        try:
            while request.unread or request.finish_reason is None:
                if request.unread:
                    yield request.unread.popleft()
                else:
                    self.engine.step()
        finally:
            self.engine.cancel(request)

    def session(self, strategy: str | Strategy | None = None) -> Session:
        """Return a conversation that continues on its own cache."""
        return Session(self, Strategy.parse(self.strategy if strategy is None else strategy))

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; ids are passed through."""
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self.engine.model.tokenizer
        if tokenizer is None:
            name = self.engine.model.name
            raise ConfigError(f"{name} has no tokenizer; choose a model that has one, or give token ids from Python")
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]  # the engine refuses what is too long
        return ids

    def _as_batch(self, prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
        if hasattr(prompts, "tolist"):  # a tensor or array of token ids
            prompts = prompts.tolist()
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            return [prompts]  # type: ignore[list-item]  # a text or one list of ids, checked just above
        if len(prompts) == 0:
            raise ConfigError("no prompt is given; give at least one")
        return list(prompts)  # type: ignore[arg-type]  # the only case left is a list of prompts

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
        """Return the answer to the next turn."""
        engine, params = self._llm.engine, sampling_params or SamplingParams()
        ids = self._llm.encode(prompt)
        if self._request is None:
            self._request = engine.add_request(ids, params, self._strategy)
            self._request.held_by_session = True
        else:
            engine.continue_request(self._request, ids, params)
        try:
            while self._request.finish_reason is None:
                engine.step()
        except BaseException:
            self.close()
            raise
        return output_of(self._request)

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
