"""The model class of kvatlas for lm-eval, registered there as ``kvatlas`` when this module is imported.

A multiple-choice question is scored as generation would meet it: the question is the prompt, the strategy cuts after
it, and each choice follows as decode steps that attend to what is left (`kvatlas.engine.scoring`). The last token of
the question is a decode step too, so that choices of one token depend on the strategy as well.
Needs the extra ``eval``; importing this module without it raises ImportError.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from kvatlas.core.errors import CapacityError, ConfigError
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.scoring import ScoreJob, score
from kvatlas.evaluation.rolling import refuse_fractions, rolling_jobs
from kvatlas.models.loading import LoadedModel

DEFAULT_OUTPUT_TOKENS = 256

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "seed")


class KvatlasLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model under a strategy, as lm-eval sees it.

    Args:
        pretrained: a folder, a hub id, a model loaded before, or None for the bundled model.
        strategy: what manages the cache, such as ``"h2o(heavy=0.1, recent=0.1)"``.
        kv_memory: byte budget of the cache.
        dtype: of weights and activations.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"``; None is the CPU.
        linear_weights: copies of weights for steps of few tokens on the CPU; ``"int8"`` and its like round them.
        held_back: last tokens of a question that are fed after the cut; 0 is what generation does.
        max_gen_toks: most tokens of an answer where a task names no number.
        batch_size: without effect; the engine batches what fits into its memory.
        max_batch_size: without effect, as above.
        engine_options: further options of `kvatlas.engine.engine.Engine`.

    Attributes:
        num_truncated: questions so far whose beginning was cut off, because the model has too few positions.

    Raises:
        ConfigError: the model has no tokenizer, or a value cannot be used.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel | None = None,
        strategy: str = "full",
        kv_memory: str | int = "1GiB",
        dtype: str = "auto",
        device: str | None = None,
        linear_weights: str = "auto",
        held_back: int = 1,
        max_gen_toks: int = DEFAULT_OUTPUT_TOKENS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **engine_options: Any,
    ) -> None:
        super().__init__()
        del batch_size, max_batch_size
        weights = {"dtype": dtype, "device": device or "cpu", "linear_weights": linear_weights}
        self.llm = LLM(pretrained, strategy, kv_memory, **weights, **engine_options)
        if self.llm.engine.model.tokenizer is None:
            raise ConfigError(
                f"{self.llm.engine.model.name} has no tokenizer; lm-eval asks in text, choose another one"
            )
        self.tokenizer = self.llm.engine.model.tokenizer
        self.held_back, self.max_gen_toks = held_back, max_gen_toks
        self.num_truncated = 0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> KvatlasLM:
        """Return the model of ``"pretrained=NAME,strategy=h2o(heavy=0.1, recent=0.1),kv_memory=1GiB"``.

        Commas inside parentheses belong to the strategy.

        Raises:
            ConfigError: a part is not ``name=value``.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**parse_arguments(arg_string), **given)

    @property
    def max_length(self) -> int:
        """Most tokens of a question and its answer."""
        return self.llm.engine.store.lanes.shape.max_positions

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise ConfigError(f"the tokenizer of {self.llm.engine.model.name} names no end token, which lm-eval needs")
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: its beginning, else its end."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids; special ones as the tokenizer adds them, unless told or there already."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and begin and string.startswith(begin):
            add_special_tokens = False
        extra = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, verbose=False, **extra)["input_ids"]
        return ids

    def loglikelihood_rolling(self, requests: Seq[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, its first token after the prefix token.

        Raises:
            UnsupportedError: the strategy keeps shares of the prompt, which is one token here.
        """
        refuse_fractions(self.llm.strategy)
        texts = [request.args[0] for request in requests]
        windows = [
            rolling_jobs(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                longest=self.max_length,
            )
            for text in texts
        ]
        scores = iter(self._score([job for jobs in windows for job in jobs], disable_tqdm))
        found = [sum(next(scores)[0] for _ in jobs) for jobs in windows]
        for text, logprob in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), logprob)
        return found

    def generate_until(self, requests: Seq[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that generation gives under the strategy, up to a stop string.

        As lm-eval's own model does, the text of the end token is a stop string too, and stop strings cut the text
        once more when special tokens have been left out of it.
        """
        prompts, params = [], []
        end = self.tokenizer.eos_token or ""
        for context, arguments in (request.args for request in requests):
            asked = sampling(arguments, self.max_gen_toks)
            params.append(replace(asked, stop=tuple(filter(None, (*asked.stop, end)))))
            prompts.append(self._last(self.tok_encode(context), self.max_length - asked.max_tokens))
        if not prompts:
            return []
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        found = []
        for request, each, output in zip(requests, params, outputs, strict=True):
            text = self.tokenizer.decode(list(output.outputs[0].token_ids), skip_special_tokens=True)
            found.append(min((text.partition(stop)[0] for stop in each.stop), key=len, default=text))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _loglikelihood_tokens(
        self, requests: Seq[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        jobs = []
        for _, context, continuation in requests:
            if len(continuation) >= self.max_length:
                raise CapacityError(
                    f"a choice of {len(continuation)} tokens leaves no room for its question in the {self.max_length} "
                    f"positions of {self.llm.engine.model.name}; choose a model with more"
                )
            kept = self._last(context, self.max_length - len(continuation))
            jobs.append(ScoreJob(context=tuple(kept), continuation=tuple(continuation)))
        found = self._score(jobs, disable_tqdm)
        for (texts, _, _), one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, one)
        return found

    def _score(self, jobs: Seq[ScoreJob], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(jobs), desc="scoring", disable=disable_tqdm or None) as bar:
            scores = score(self.llm.engine, jobs, self.llm.strategy, held_back=self.held_back, on_finished=bar.update)
        return [(one.logprob, one.is_greedy) for one in scores]

    def _last(self, tokens: list[int], room: int) -> list[int]:
        """Return the last tokens that there is room for, and count what had to be cut."""
        if room < 1:
            raise ConfigError(f"an answer leaves no room in the {self.max_length} positions; lower max_gen_toks")
        self.num_truncated += len(tokens) > room
        return tokens[-room:]


register_model("kvatlas")(KvatlasLM)


def parse_arguments(text: str) -> dict[str, Any]:
    """Return ``"name=value,name=value"`` as a dict; whole numbers become integers.

    Raises:
        ConfigError: a part is not ``name=value``.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, parts)):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"model argument {part!r} is not understood; write name=value, separated by commas")
        found[name.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    return found


def sampling(arguments: dict[str, Any], default_tokens: int) -> SamplingParams:
    """Return what a task's generation arguments ask of the engine.

    Raises:
        ConfigError: an argument is not known here; silence would change the answers.
    """
    known = {"until", "do_sample", *_LENGTH_NAMES, *_SAMPLING_NAMES}
    if unknown := sorted(arguments.keys() - known):
        raise ConfigError(f"generation arguments {', '.join(unknown)} are unknown; known: {', '.join(sorted(known))}")
    until = arguments.get("until") or ()
    lengths = [arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None]
    chosen = {name: arguments[name] for name in _SAMPLING_NAMES if arguments.get(name) is not None}
    if "temperature" in chosen:
        chosen["temperature"] = _number(float, "temperature", chosen["temperature"])
    if not arguments.get("do_sample", chosen.get("temperature", 0) > 0):
        chosen = {}
    elif "temperature" not in chosen:
        chosen["temperature"] = 1.0
    return SamplingParams(
        max_tokens=_number(int, "the length of an answer", lengths[0]) if lengths else default_tokens,
        stop=tuple(filter(None, until)) if isinstance(until, list | tuple) else until,
        **chosen,
    )


def _number(kind: type[int] | type[float], name: str, value: Any) -> Any:
    """Return a number as lm-eval reads it: tasks and command lines write some of them as texts."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name} is {value!r} in a task's generation arguments; write a number") from error
