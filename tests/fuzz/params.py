"""SamplingParams: every field with values that a user of vLLM, OpenAI or transformers may pass, and with nonsense."""

from __future__ import annotations

from random import Random

from tests.fuzz.harness import Case, Target
from tests.fuzz.values import OTHERS, REAL, SCALARS, SEQUENCES, TEXTS, WHOLE, odd, value
from tests.fuzz.workplace import INNOCENT, Workplace, must

from kvatlas.engine.params import SamplingParams

# What each field is meant to take, beside what it is not.
_FITTING: dict[str, tuple[str, ...]] = {
    "max_tokens": ("1", "2", "3", "16", "np.int64(3)", "torch.tensor(3)"),
    "min_tokens": ("0", "1", "2"),
    "temperature": ("0", "0.0", "0.7", "1", "2.5", "np.float32(0.5)", *REAL),
    "top_k": ("0", "1", "5", "1023", "1024", "1025", "-1"),
    "top_p": ("0.1", "0.9", "1", "1.0", "1e-9", "np.float32(0.5)"),
    "seed": ("0", "7", "None", "2**63 - 1", "-1"),
    "stop": ("'a'", "['a', 'b']", "()", "None", "('<|end|>',)", "'\\n'"),
    "stop_token_ids": ("[3]", "(0,)", "[]", "np.array([3, 5])", "None", "[1023]", "[1024]"),
    "ignore_eos": ("True", "False"),
}
_FOREIGN = (
    *("max_token", "max_new_tokens", "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("min_p", "logit_bias", "logprobs", "logits_processors", "stop_sequences", "do_sample", "skip_special_tokens"),
)
_KINDS = {
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed"), (WHOLE, REAL, SCALARS, TEXTS, OTHERS)),
    **dict.fromkeys(("temperature", "top_p"), (REAL, WHOLE, SCALARS, TEXTS, OTHERS)),
    **dict.fromkeys(("stop", "stop_token_ids"), (TEXTS, SEQUENCES, OTHERS, SCALARS)),
    "ignore_eos": (SCALARS, OTHERS, TEXTS),
}


def make(rng: Random, place: Workplace) -> Case:
    """Return a case: parameters are made; if that goes well, a few tokens are generated with them."""
    source, kind = _source(rng), rng.choice(("plain", "plain", "chat", "bare"))

    def run() -> None:
        params = value(source)
        try:
            llm = place.llm(kind)
            outputs = llm.generate([INNOCENT, INNOCENT[:3]], params)
            for output, given in zip(
                outputs, params if isinstance(params, list | tuple) else [params] * 2, strict=True
            ):
                _check(output.outputs[0].token_ids, given)
        finally:
            place.check(kind)

    return Case(told=f"{kind}: generate([ids, ids], {source})", run=run)


def _source(rng: Random) -> str:
    if rng.random() < 0.06:  # something else in its place
        return odd(rng)
    if rng.random() < 0.06:
        return f"[{', '.join(_call(rng) for _ in range(rng.choice((0, 1, 2, 2, 3))))}]"
    return _call(rng)


def _call(rng: Random) -> str:
    names = rng.sample(sorted(_FITTING), rng.choice((1, 1, 2, 3)))
    arguments = {name: odd(rng, _KINDS[name]) if rng.random() < 0.6 else rng.choice(_FITTING[name]) for name in names}
    if rng.random() < 0.05:
        arguments[rng.choice(_FOREIGN)] = rng.choice(("1", "0.5", "True", "None", "{3: 1.0}"))
    return f"SamplingParams({', '.join(f'{name}={source}' for name, source in arguments.items())})"


def _check(token_ids: tuple[int, ...], params: SamplingParams | None) -> None:
    params = params or SamplingParams()
    must(all(type(token) is int and 0 <= token < 1024 for token in token_ids), f"token ids {token_ids}")
    must(1 <= len(token_ids) <= params.max_tokens, f"{len(token_ids)} tokens under {params}")


TARGET = Target(name="params", make=make)
