"""What a user asks of a generation, under vLLM's parameter names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

from kvatlas.core.errors import ConfigError
from kvatlas.core.messages import shown
from kvatlas.core.names import unknown_name
from kvatlas.engine.given import is_whole, listed, plain
from kvatlas.engine.prompts import check_text, token_ids

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as in vLLM: logits that differ by 2e-4 would be a factor of e^20 apart."""

_SETS = (set, frozenset)
_MOST = 2**63
_SMALLEST_FLOAT32, _LARGEST_FLOAT32 = 1.1754943508222875e-38, 3.4028234663852886e38

# Of vLLM, OpenAI and transformers; known, so that whoever asks for one reads more than "unknown".
_NOT_SUPPORTED = frozenset(
    {
        *("n", "best_of", "num_return_sequences", "num_beams", "use_beam_search", "length_penalty", "do_sample"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "no_repeat_ngram_size", "logit_bias"),
        *("min_p", "typical_p", "bad_words", "allowed_token_ids", "logits_processors", "structured_outputs"),
        *("logprobs", "top_logprobs", "prompt_logprobs", "echo", "stream", "tools", "tool_choice"),
        *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "detokenize"),
        *("truncate_prompt_tokens", "output_kind", "extra_args"),
    }
)
# What others call these parameters.
_CALLED_HERE = {
    **dict.fromkeys(("max_new_tokens", "max_completion_tokens", "max_output_tokens", "max_gen_toks"), "max_tokens"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop"),
    **dict.fromkeys(("eos_token_id", "stop_tokens"), "stop_token_ids"),
    "min_new_tokens": "min_tokens",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    Numbers may be scalars of numpy or torch. Nothing is rounded to fit: 3.0 is no count, and True no number.

    Args:
        max_tokens: most tokens to generate.
        min_tokens: tokens before which neither the end token nor a stop string ends the output.
        temperature: 0 is greedy, and so is anything below 1e-5, which becomes 0; otherwise logits are divided by it.
        top_k: sample among this many most likely tokens; 0 or -1 for all.
        top_p: sample among the most likely tokens that together reach this probability, in (0, 1].
        seed: makes sampling repeatable; None or -1 draws one.
        stop: strings that end the output; they are not part of it. They are looked for in all that the model writes,
            the text of special tokens included, which the output leaves out. None is none.
        stop_token_ids: tokens that end the output, beside the model's end token; they are part of it. None is none.
        ignore_eos: go on after the model's end token.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
        UnknownNameError: there is no such parameter.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False

    def __new__(cls, *positional: object, **given: object) -> Self:
        """Refuse what ``__init__`` would refuse without a hint."""
        if positional:
            raise ConfigError(f"sampling parameters are given by name, got {shown(positional[0])}; write max_tokens=16")
        known = {field.name for field in fields(cls)}
        for name in given:
            if name in _NOT_SUPPORTED:
                raise ConfigError(f"the sampling parameter {name!r} is not supported yet; leave it out")
            if name in _CALLED_HERE:
                raise ConfigError(f"the sampling parameter {name!r} is called {_CALLED_HERE[name]!r} here; rename it")
            if name not in known:
                raise unknown_name("sampling parameter", name, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        temperature = _number("temperature", self.temperature, f"from 0 to {_LARGEST_FLOAT32:.2g}")
        top_k, seed = plain(self.top_k), plain(self.seed)
        settled = {
            "max_tokens": _whole("max_tokens", self.max_tokens, 1),
            "min_tokens": _whole("min_tokens", self.min_tokens, 0),
            "temperature": temperature if temperature >= GREEDY_BELOW else 0.0,
            "top_k": 0 if is_whole(top_k) and top_k == -1 else _whole("top_k", top_k, 0, "; 0 and -1 are all tokens"),
            "top_p": _number("top_p", self.top_p, "above 0 and at most 1"),
            "seed": None if seed is None or (is_whole(seed) and seed == -1) else _whole("seed", seed, -_MOST),
            "stop": _strings(self.stop),
            "stop_token_ids": _stop_ids(self.stop_token_ids),
            "ignore_eos": plain(self.ignore_eos),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        self._check_ranges(temperature)

    def _check_ranges(self, temperature: float) -> None:
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower it")
        if not 0 <= temperature <= _LARGEST_FLOAT32:  # beyond, float32 logits divided by it are no numbers
            raise _wrong("temperature", temperature, f"a finite number from 0 to {_LARGEST_FLOAT32:.2g}")
        if not 0 < self.top_p <= 1:
            raise _wrong("top_p", self.top_p, "a number above 0 and at most 1")
        if self.top_p < _SMALLEST_FLOAT32:  # beside float32 probabilities it would be 0, which keeps no token
            object.__setattr__(self, "top_p", _SMALLEST_FLOAT32)
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", self.ignore_eos, "True or False")


def _wrong(name: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{name} must be {wanted}, got {shown(value)}")


def _whole(name: str, value: object, least: int, hint: str = "") -> int:
    """Return a count that fits into 64 bits."""
    number = plain(value)
    if not is_whole(number) or not least <= number < _MOST:
        lowest = "-2**63" if least == -_MOST else least
        raise _wrong(name, value, f"a whole number from {lowest} to 2**63 - 1{hint}")
    return int(number)


def _number(name: str, value: object, wanted: str) -> float:
    """Return a float; what is too large for one is infinite, for the range to refuse."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _wrong(name, value, f"a number {wanted}")
    try:
        return float(number)
    except OverflowError:
        raise _wrong(name, value, f"a finite number {wanted}") from None


def _strings(stop: Any) -> tuple[str, ...]:
    """Return stop strings as a tuple; one alone needs no list."""
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else sorted(stop, key=str) if isinstance(stop, _SETS) else listed(stop)
    if strings is None:
        raise _wrong("stop", stop, "a string or a list of strings")
    for string in strings:
        if not isinstance(string, str):
            raise ConfigError(f"stop holds {shown(string)}, which is no string; give text such as stop=['###']")
        if not string:
            raise ConfigError("a stop string is empty, and would end every output at once; leave it out")
        check_text(string, "a stop string")
    return tuple(map(str, strings))


def _stop_ids(ids: Any) -> tuple[int, ...]:
    """Return stop tokens as a tuple; one alone needs no list."""
    if ids is None:
        return ()
    one = plain(ids)
    if is_whole(one):
        return tuple(token_ids([one], "stop_token_ids"))
    return tuple(token_ids(sorted(ids, key=str) if isinstance(ids, _SETS) else ids, "stop_token_ids"))
